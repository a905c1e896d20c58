"""The learner: programs, each started as `python -m` of a module."""

from treegrpo.runtime.process_environment import isolate_module_process

isolate_module_process()
