"""Other servers for the same model, to compare ours with; `setup.sh` makes their environment.

They listen where KServe does, so that `ServerProcess(module, …, python=<that environment's>)`
starts them and any client of ours can ask them.
"""
