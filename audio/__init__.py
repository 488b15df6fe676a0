"""Sound to text: the package for Whisper, its features, decoding and word timings.

Nothing is here yet: this version of Pellucid cannot transcribe.
"""
