"""Which layers to compress how much: an evolutionary search (`evolution`) over levels per layer (`levels`), each
candidate judged by how far the model's predictions move (`trial`), over processes or a Ray cluster (`executors`).
"""
