"""Reads image files as people see them, or refuses them with a reason; independent of LMDeploy.

The service and the extension of LMDeploy share this package: `files` checks the header of a file
and decodes it to upright RGB rows.
"""
