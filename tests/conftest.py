"""Settings of all tests."""

import signal

from hypothesis import settings

# Time says nothing about right or wrong, and a busy machine must not fail a test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A script's background job starts with SIGINT ignored, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
