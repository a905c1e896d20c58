"""The engine for production: SGLang servers, one as a child of this process or several that others run.

    factory.py           opens the engine: starts a child or checks the servers of others
    engine.py            Engine: generate, load_weights, check_health; start reading here
    admission_queue.py   which request gets a slot, and on which server (prefix_router.py by prefix)
    supervision.py       load, health and metrics of the servers; restarts
    server/              one server:
      server.py              its state, requests to it, weight swaps
      http_client.py         its HTTP API (responses.py validates the responses)
      aimd_limit.py          how many requests it may run at once
      prefill_dedup.py       requests wait for a prefix that another one computes (prefix_blocks.py)
      pending_generation.py  one completion from one or several responses; where stop strings cut
      server_process.py      a child process (launch_command.py its command line)
      weight_staging.py      policy versions, checked, where servers read them
      timings.py             deadlines, intervals, back-off delays

docs/sglang.md is for those who run it.
"""

from services.sampler.engines.sglang.engine import SGLangEngine
from services.sampler.engines.sglang.factory import EngineRequirements, ListenOptions, open_child, open_remote

__all__ = ["EngineRequirements", "ListenOptions", "SGLangEngine", "open_child", "open_remote"]
