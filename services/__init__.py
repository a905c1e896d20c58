"""The services beside the learner, and the command line: programs, each started as `python -m` of a module."""

from treegrpo.runtime.process_environment import isolate_module_process

isolate_module_process()
