"""The trainer: groups to advantages to packs to an optimizer step to a policy version. Start reading at `loop.py`."""
