"""What TurboMind with the extension does on a GPU, in ten minutes: ``python -m benchmarks.gpu_kit``.

plan        the steps, their time limits, what each needs; sizes of a full run and of a dry run
parts       collects what an offline machine lacks, in parts; receives and checks them there
layout      finds LMDeploy installed, or lays it out from the parts
prepare     checkpoints, images and the truth, made by the processor beside the first steps
conduct     runs the steps in processes of their own, each within its limit, and goes on where it was
worker      such a process: one engine, the steps that share it
steps       what is checked; workload: what is measured
report      the results as JSON and Markdown
"""
