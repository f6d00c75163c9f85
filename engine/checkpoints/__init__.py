"""Getting a model onto this machine's disk: `resolve` turns what the user wrote into a folder that can be served.

resolve.py says what the user may write; demo.py, convert.py, hub.py and folder.py each serve one kind of it; cache.py
keeps the results. Importing this package is cheap: nothing heavy loads before it is needed.
"""

from engine.checkpoints.progress import Progress, Silent, Unit
from engine.checkpoints.resolve import resolve

__all__ = ["resolve", "Progress", "Silent", "Unit"]
