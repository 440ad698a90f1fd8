"""Answers for millions of images: ``qwen3vl batch``, on Ray Data.

A run is cut into shards, each of which becomes one file. ``sources`` cuts the input, ``outputs`` writes
the files and the record of the plan, ``engine`` answers rows in the process of an actor, ``actors`` joins
both on Ray, and ``job`` is the driver. ``map_batches`` in ``actors`` is for pipelines of others.

Needs the extra ``batch``. Nothing else of the service imports this package, except its command.
"""
