"""Text only: with `--disable-vision` or `--language-model-only`, pictures, video and audio are refused.

Stock LMDeploy leaves the vision tower out in this mode, but drops content parts that it does not
know, and some that it does, and answers as if they had not been sent.
"""
