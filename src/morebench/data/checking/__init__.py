"""Checks a training data set once: every record parsed, every image decoded, what is wrong counted and kept.

The order of work: `looks` reads and decodes images in processes of its own and keeps what it learnt, `check`
puts records and images together into findings, a quarantine list and a manifest, `pictures` draws the
histogram and the contact sheet. `morebench.data.checked` opens what a check has written, for training.
"""
