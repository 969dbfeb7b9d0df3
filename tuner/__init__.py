"""The tuner: measures plans on this machine and keeps the winners in the store. The library never imports it.

Read it in this order: `presets` (which problems), `space` (which plans), `measure` (how they race), `sweep` (one
problem from plans to winner), `writer` (the store's writing half), `target`, `cpu` and `gpu` (devices), `tune` and
`daemon`.
"""
