"""Where the mini model comes from: its scene generator, its training script and its model card.

The trained model itself is part of the package (:mod:`hero.mini`).
"""
