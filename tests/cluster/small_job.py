"""What test_job_submit submits: attaches as every program does, runs an actor, tells what it found."""

from __future__ import annotations

import json
import os
from pathlib import Path

from actors.cluster.session import ray_session


def main() -> None:
    with ray_session() as session:
        import ray

        @ray.remote(num_cpus=1)
        class Worker:
            def imports(self) -> str:
                import apps.program.config as config

                return config.__file__

            def environment(self) -> dict[str, str]:
                return dict(os.environ)

        worker = Worker.remote()
        where = ray.get(worker.imports.remote())
        environment = ray.get(worker.environment.remote())
    uploaded = [path for path in Path().rglob("*") if path.is_file()]
    found = {
        "started": session.started,
        "address": session.address,
        "worker_runs_uploaded_code": Path(where).is_relative_to(Path.cwd()),
        "worker_deadline": environment.get("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S"),
        "folders": sorted(path.name for path in Path().iterdir() if path.is_dir()),
        "uploaded_mib": sum(path.stat().st_size for path in uploaded) / 2**20,
    }
    print("FOUND " + json.dumps(found))


if __name__ == "__main__":
    main()
