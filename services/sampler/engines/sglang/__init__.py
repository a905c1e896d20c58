"""The engine for production: SGLang servers, one as a child of this process or several that others run.

    open.py      what to start or to find, and what must be true of it
    engine.py    Engine: generate, load, health; start reading here
    floor.py     who gets a place on which server (routing.py by prefix, pressure.py how many)
    server.py    one server: ask it, swap its weights (api.py over HTTP, answers.py what it may say)
    prefill.py   siblings wait for what one of them computes
    draft.py     one completion from one or several answers; where stop strings cut
    watch.py     is it up; restarts (child.py the process, command.py its command line)
    stage.py     policy versions, checked, where servers read them

docs/sglang.md is for those who run it.
"""

from services.sampler.engines.sglang.engine import SGLangEngine
from services.sampler.engines.sglang.factory import Demands, Place, open_child, open_remote

__all__ = ["Demands", "Place", "SGLangEngine", "open_child", "open_remote"]
