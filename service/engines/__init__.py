"""Engines: implementations of service.engine.Engine."""
