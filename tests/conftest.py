"""Settings of all tests."""

from hypothesis import settings

# Time says nothing about right or wrong, and a busy machine must not fail a test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
