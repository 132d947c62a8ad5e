"""Draws a pre-training subset from local shards of LAION or Recap-DataComp-1B.

The order of work: `shards` finds the input, `scan` reads every shard once into a table of candidates,
`ranking` goes through these by a hash of seed and id, `look` decodes images until enough are usable, and
`build` writes records, images and a manifest. Which samples are taken depends on the seed and on what the
shards hold, not on how they are cut, named or ordered, nor on the number of workers.
"""
