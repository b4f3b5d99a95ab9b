"""The pictures that the pocket recipe trains on: scenes, dead leaves, photographs, and the captions of scenes."""
