"""The recipe of the embedded checkpoint `demo`: text, speech, training, evaluation, export.

Nothing in here is needed to use the checkpoint. Steps, each one command (see MODEL_CARD.md):
`python -m weights.demo.speech`, `.train`, `.export`, `.evaluate`, `.samples`.
"""
