"""The Ethos-U format: programs of fixed shapes for Arm's NPU, with their time as Arm's compiler estimates it."""
