"""The embedded engine, in the sampler's own process: torch on the CPU, batched, with a radix prefix cache.

    generate() ─► waiting ─► admit ─► copy cached KV ─► prefill ─► decode ─► decode ─► … ─► finished ─► future
                             scheduler  radix + memory   model      one token per running request a step

Start reading at `scheduler.py`.
"""

from services.sampler.engines.embedded.engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
