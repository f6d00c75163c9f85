"""One model over several devices: every layer split over TP ranks, the layers over PP stages."""
