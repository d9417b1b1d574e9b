"""ott warns on import that jaxopt is no longer maintained; our module, imported first, keeps that
to itself.
"""

import downscaling.debias.entropic.ott_geometry  # noqa: F401
