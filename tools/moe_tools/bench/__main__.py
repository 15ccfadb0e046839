"""Entry of `python -m moe_tools.bench`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the benchmark that the first word names."""
    match sys.argv[1:]:
        case ["throughput", *rest]:
            from moe_tools.bench.throughput import main as run

            run(rest)
        case ["ranks", *rest]:
            from moe_tools.bench.ranks import main as run_ranks

            run_ranks(rest)
        case ["kernels", *rest]:
            from moe_tools.bench.kernels import main as run_kernels

            run_kernels(rest)
        case ["slice", *rest]:
            from moe_tools.bench.layer_slice import main as run_slice

            run_slice(rest)
        case ["fabric", *rest]:
            from moe_tools.bench.fabric.run import main as run_fabric

            run_fabric(rest)
        case ["recorder", *rest]:
            from moe_tools.bench.recorder import main as run_recorder

            run_recorder(rest)
        case ["balance", *rest]:
            from moe_tools.bench.balance import main as run_balance

            run_balance(rest)
        case words:
            raise SystemExit(
                "python -m moe_tools.bench throughput|ranks|kernels|slice|fabric|recorder|balance …: "
                f"{' '.join(words) or 'nothing'} given"
            )


if __name__ == "__main__":
    main()
