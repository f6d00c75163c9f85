"""`slipstream bench soak`: a server under full load for a long time. Nothing may be lost, and nothing may grow."""
