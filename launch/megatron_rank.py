"""One rank of a run on Megatron-Core (see megatron.sh). Saving a checkpoint starts processes that import this again."""

if __name__ == "__main__":
    import tyro

    from lasp.integrations.megatron.run import Run
    from lasp.integrations.megatron.sequence import leave_mesh
    from lasp.integrations.megatron.train import train
    from lasp.launched import recorded
    from lasp.training.stop import Stopped

    def main() -> None:
        try:
            train(tyro.cli(Run))
        except Stopped:
            leave_mesh()
            raise
        leave_mesh()

    recorded(main)()
