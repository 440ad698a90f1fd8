"""The gRPC front end: decode a call, run it, encode its answer."""
