"""Generated from protos/ by ``python -m protos.generate``. Not edited by hand."""
