"""Run the commands as a user does."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from assemble.commands.main import _status_of, main
from assemble.reporting.papers import project_root
from assemble.stages.configuration import resolve
from assemble.stages.request import Selection, find_request
from assemble.stages.run import stage_configuration
from tests.machine import LONG


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["fit", "--help"],
        ["reproduce", "--help"],
        ["list", "avid"],
        ["claims", "avid"],
    ],
)
def test_help_lists_and_tables_do_not_import_torch(arguments: list[str]) -> None:
    program = (
        "import sys; from assemble.commands.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('LOADED', [name for name in ('torch', 'lightning') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=project_root(), timeout=LONG, check=True)
    assert done.stdout.endswith("LOADED []\n")


def test_a_reader_that_goes_away_ends_a_command_without_a_word() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "assemble", "claims", "avid"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=project_root(), check=False)
    os.close(write)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--verion"], "there is no option '--verion': did you mean '--version'?"),
        (["reproduce", "avid", "--seeds", "0,1"], "got 0,1 (separate several with spaces)"),
        (["plan", "avid", "--seeds", "0", "1", "0"], "--seeds 0 1 0: give each seed once"),
        (
            ["fit", "avid/avid", "--trainer.max_epochs", "0"],
            "command line trainer.max_epochs: a stage that trains no step",
        ),
        (
            ["fit", "vx2text/avsd", "--trainer.max_steps=0"],
            "command line trainer.max_steps: a stage that trains no step",
        ),
    ],
)
def test_a_mistake_ends_a_command_before_it_starts(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


def test_a_wrong_mode_of_wandb_ends_a_command_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "onlne")
    assert main(["reproduce", "avid", "--scale", "smoke", "--runs", str(tmp_path)]) == 2
    assert "WANDB_MODE=onlne: did you mean 'online'?" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "cache/features.npz")

    monkeypatch.setattr("assemble.commands.find._list_paper", full)
    assert main(["list", "avid"]) == 1
    printed = capsys.readouterr().err
    assert "cache/features.npz" in printed
    assert "ASSEMBLE_CACHE" in printed


def test_make_refuses_a_variable_that_it_does_not_know() -> None:
    def make(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--dry-run", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=project_root(), timeout=LONG, check=False)

    for wrong, meant in (("SEED=1", "SEEDS"), ("FATS=1", "FAST"), ("SCALES=a b", "SCALE")):
        done = make("plan-avid", wrong)
        assert done.returncode == 2
        assert f"there is no variable {wrong.partition('=')[0]}: did you mean {meant}?" in done.stderr
    done = make("-j2", "plan-avid", "SEEDS=0 1", "OMP_NUM_THREADS=2", "WANDB_MODE=offline", "PYTHON=python3.11")
    assert "plan avid --scale mini --seeds 0 1 " in done.stdout
    assert done.returncode == 0
    # The pages and `make help` must not use any other variable.
    pages = [*project_root().glob("*.md"), *project_root().glob("docs/*.md"), *project_root().glob("papers/*/*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    lines = [*re.findall(r"\bmake [^`\n]*", text), make("help").stdout]
    used = {name for line in lines for name in re.findall(r"\b([A-Z_]+)=", line)}
    assert {"SCALE", "FILE", "GROWTH", "RERUN"} <= used
    assert make("plan-avid", *(f"{name}=1" for name in sorted(used))).returncode == 0


def test_reproduce_skips_what_is_done(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["reproduce", "avid", "--scale", "smoke", "--runs", str(tmp_path), "--stages", "esc@avid"]
    arguments += ["--jobs", "1"]  # faster than a new process, which imports all again
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "2 stages, 0 done, 2 to run" in first
    assert "\n[2/2] esc@avid seed 0: best_top1" in first
    assert "AVID-CMA at smoke scale, seed 0" in first
    assert main(arguments) == 0
    assert "2 stages, 2 done, 0 to run" in capsys.readouterr().out
    tables = (tmp_path / "avid_cma" / "smoke" / "tables.md").read_text(encoding="utf-8")
    assert "ESC-50" in tables
    # If a stage fails, the exit status is 1.
    monkeypatch.setattr("assemble.stages.reproduce.run_paper", lambda *_, **__: {(0, "avid"): "made to fail"})
    assert main(arguments) == 1


def test_fit_and_test(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ["avid/avid", "--scale", "smoke", "--runs", str(tmp_path)]
    assert main(["fit", *common]) == 0
    fitted = capsys.readouterr().out
    assert "test/retrieval_r1" in fitted
    assert main(["test", *common, "--validation"]) == 0
    assert "val/loss" in capsys.readouterr().out
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    assert main(["test", *common, "--checkpoint", str(checkpoint), "--seed", "0"]) == 0
    assert (
        capsys.readouterr().out.split("test/retrieval_r1")[1].split()[0]
        == fitted.split("test/retrieval_r1")[1].split()[0]
    )


def test_doctor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--data", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("\ncache ", "\ngpu ", "\nrevision ", "  mct: missing "))


def test_a_library_that_does_not_fit_into_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _status_of(ImportError("libtorch_cpu.so: failed to map segment", path="/lib/torch/_C.so")) == 1
    assert capsys.readouterr().err.startswith("assemble: libtorch_cpu.so: failed to map segment\n")
    with pytest.raises(ImportError):
        _status_of(ImportError("cannot import name 'x'", path="/mine/module.py"))


def test_print_config_shows_the_stack(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["fit", "avid/avid_cma", "--scale", "smoke", "--runs", str(tmp_path), "--print_config"]) == 0
    output = capsys.readouterr().out
    assert (
        "configs/trainer.yaml < configs/hardware/cpu.yaml < configs/avid_cma/base.yaml < configs/avid_cma/cma.yaml"
        in output
    )
    assert "model.init_args.warm_start <- stage avid" in output
    assert "agreement: consensus   # configs/avid_cma/cma.yaml\n" in output
    assert "within_negatives: 8   # configs/avid_cma/smoke.yaml [cma]\n" in output
    assert "batch_norm_group: 4   # configs/avid_cma/smoke.yaml [pretraining]\n" in output
    printed = yaml.safe_load(output)["model"]
    assert printed["class_path"] == "papers.avid_cma.module.AVIDModule"
    assert "warm_start" not in printed["init_args"]  # if used as --config, it must not override the parent
    assert main(["fit", "avid/avid", "--scale", "mini", "--runs", str(tmp_path), "--print_config"]) == 0
    assert "\n# deviation of scale mini: model.init_args.head_batch_norm: Batch " in capsys.readouterr().out


def test_a_file_of_overrides_wins_over_the_tables_parent_and_names_the_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    selection, arguments = Selection(scale="smoke", runs=tmp_path), ["--config", str(file)]
    folders = []
    for weights in ("a.pth", "b.pth"):
        file.write_text(f"model: {{init_args: {{pretrained: {weights}}}}}", encoding="utf-8")
        request = find_request("avid/ucf_1@avid", selection, arguments)
        assert not request.parents
        assert stage_configuration(request)["model"]["init_args"]["pretrained"] == weights
        folders.append(request.directory)
    assert folders[0] != folders[1]
    file.write_text("model: {init_args: {learning_rate: 0.1}}", encoding="utf-8")
    assert list(find_request("avid/ucf_1@avid", selection, arguments).parents) == ["model.init_args.pretrained"]


def test_the_content_of_weights_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = Selection(scale="smoke", runs=tmp_path / "runs")
    folders = []
    for content in (b"one", b"other", b"one"):
        (tmp_path / "mine.pth").write_bytes(content)
        monkeypatch.chdir(tmp_path)
        folders.append(find_request("mct/voc_detection", selection, ["--model.pretrained", "mine.pth"]).directory)
    assert folders[0] == folders[2] != folders[1]
    # The file of weights may be in a mapping, in a folder, or in the data folder.
    (tmp_path / "folder").mkdir()
    named = [
        ("mct/voc_detection", ["--model", "{init_args: {pretrained: mine.pth}}"], "mine.pth"),
        ("m3p/m3p", ["--model.pretrained", "folder"], "folder/model.safetensors"),
        ("mct/voc_detection", ["--model.pretrained", "$DATA/mine.pth"], "mine.pth"),
    ]
    for stage, flags, file in named:
        before, after = (
            (tmp_path / file).write_bytes(content)
            and find_request(stage, Selection(scale="smoke", runs=tmp_path / "runs", data=tmp_path), flags).directory
            for content in (b"one", b"other")
        )
        assert before != after, flags


def test_a_class_and_its_arguments_may_come_in_any_order() -> None:
    flags = [["--data.dataset", "folder"], ["--data.dataset.root", "/mine"]]
    for first, second in (flags, flags[::-1]):
        data = resolve("mct", "mct", scale="paper", arguments=[*first, *second]).config["data"]["init_args"]
        assert data["dataset"]["init_args"]["root"] == "/mine"
        assert data["dataset"]["class_path"] == "common.data.datasets.folder.FolderOfImages"
    arguments = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "runs/tensorboard"]
    logger = resolve("avid", "avid", scale="smoke", arguments=arguments).config["trainer"]["logger"]
    assert logger == {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs/tensorboard"}}


def test_a_finished_record_stands_until_another_replaces_it(tmp_path: Path) -> None:
    request = find_request("avid/avid", Selection(scale="smoke", runs=tmp_path))
    assert main(["fit", "avid/avid", "--scale", "smoke", "--runs", str(tmp_path)]) == 0
    record = request.directory / "record.json"
    assert main(["fit", "avid/avid", "--scale", "smoke", "--runs", str(tmp_path), "--hardware", "gpu1"]) == 2
    assert record.is_file()
    # When a stage trains again, its old record is removed, so that no other stage starts from it.
    (request.directory / "checkpoints" / "last.ckpt").unlink()
    assert main(["fit", "avid/avid", "--scale", "smoke", "--runs", str(tmp_path), "--hardware", "gpu1"]) == 2
    assert not record.exists()


def test_on_what_a_stage_runs_is_no_override(tmp_path: Path) -> None:
    table = find_request("avid/avid", Selection(scale="smoke", runs=tmp_path))
    machine = ["--trainer.devices", "2", "--trainer.num_nodes=1", "--data.num_workers", "3"]
    request = find_request("avid/avid", Selection(scale="smoke", runs=tmp_path), machine)
    assert request.directory == table.directory
    assert request.lineage == table.lineage
    assert request.configuration.config["trainer"]["devices"] == 2
    changed = [*machine, "--model.loss.temperature", "1"]
    trial = find_request("avid/avid", Selection(runs=tmp_path), changed).stage
    assert trial == find_request("avid/avid", Selection(runs=tmp_path), ["--model.loss.temperature=1"]).stage != "avid"


#: Program that runs a command, and logs every host name that is looked up and every connection to another machine.
WATCHED = """
import os, socket, sys

def note(what):
    with open(os.environ["SEEN"], "a") as file:
        print(what, file=file)

def resolve(host, *args, **kwargs):
    if host not in LOCAL:
        note(f"looked up {host}")
        raise OSError("no network")
    return genuine_resolve(host, *args, **kwargs)

def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
        note(f"connected to {address}")
        raise OSError("no network")
    return genuine_connect(self, address)

LOCAL = ("127.0.0.1", "::1", "localhost")
genuine_resolve, genuine_connect = socket.getaddrinfo, socket.socket.connect
socket.getaddrinfo, socket.socket.connect = resolve, connect
from assemble.commands.main import main
raise SystemExit(main(sys.argv[1:]))
"""


def test_nothing_leaves_the_machine(tmp_path: Path) -> None:
    """Run a stage with default W&B settings in a new process, and check that no thread or child contacts a server.

    The test watches Python's sockets. `requests` and other programs, such as W&B's, use the proxy from the environment.
    The test runs this proxy and counts the requests.
    """
    (tmp_path / "home").mkdir()
    seen = tmp_path / "seen"
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            with contextlib.suppress(OSError):  # the test closes the server
                while True:
                    one, _ = server.accept()
                    with one:
                        asked.append(one.recv(200))

        threading.Thread(target=listen, daemon=True).start()
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        environment |= {f"{kind}_proxy": proxy for kind in ("http", "https", "all")}
        environment |= {f"{kind}_PROXY": proxy for kind in ("HTTP", "HTTPS", "ALL")}
        environment |= {"HOME": str(tmp_path / "home"), "SEEN": str(seen), "WANDB_API_KEY": "0" * 40, "NO_PROXY": ""}
        environment |= {"WANDB__SERVICE_WAIT": os.environ["WANDB__SERVICE_WAIT"]}
        command = ["fit", "avid/avid", "--scale", "smoke", "--runs", str(tmp_path), "--seed", "3"]
        done = subprocess.run(
            [sys.executable, "-c", WATCHED, *command],
            cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=LONG,
        )  # fmt: skip
        server.shutdown(socket.SHUT_RDWR)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.wandb"))  # W&B did log the run
    assert not seen.exists(), seen.read_text()
    assert not asked
