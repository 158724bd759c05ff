"""A CUDA graph on the CPU, as tests can have it: the captured function is run again."""

from adaclip.graphed import GraphedStep


class Again:
    """In the place of CUDA graphs: a recorded function is not run, and then run at every replay."""

    def __init__(self, device):
        self.rehearsals = self.recorded = self.replays = 0

    def rehearse(self, run):
        self.rehearsals += 1
        run()

    def record(self, run):
        self.recorded += 1

        def replay():
            self.replays += 1
            run()

        return replay


class Emulated(GraphedStep):
    recorder = Again
