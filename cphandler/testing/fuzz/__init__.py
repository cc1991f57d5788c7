"""Random configurations held to the laws of the contract: ``python -m cphandler.testing.fuzz --minutes 5 --seed 7``.

A case follows from a seed and a number alone, so that every rank of a pool makes the same one and any of them can be
repeated: ``--case 7:123``. What is wrong is printed in one line with the way to repeat it, and the run goes on.
"""
