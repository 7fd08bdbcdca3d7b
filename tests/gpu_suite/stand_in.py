"""What the suite's processes would say on a machine with a GPU (double.py): WHAT ARGUMENT, without torch.

behaviour.json of the machine's folder tells what goes wrong: "lacks", variants that the build has not ("gelu_ffn
sm90"); "backends" that are missing; "hangs", a backend whose tests never end; "fails", one of whose tests fails;
"ends", a signal number that the suite itself is sent in the middle of the kernels, with the "results" that it has
written by then and a "pipe" to hold.
"""

import json
import os
import sys
import time

FOLDER = os.environ["RK_REHEARSAL"]
VARIANTS = {"attention": ["portable", "sm90"], "gelu_ffn": ["portable", "sm80", "sm90"]}
with open(os.path.join(FOLDER, "behaviour.json")) as stream:
    BEHAVIOUR = json.load(stream)


def write(path, **event):
    with open(path, "a") as stream:
        stream.write(json.dumps(event) + "\n")


def pytest():
    path = os.environ["RK_SUITE_OUTCOMES"]
    backend, forced = os.environ["RK_SUITE_BACKEND"], os.environ["RK_SUITE_VARIANT"].replace("=", " ")
    # "attention and cuda-sm90" of the tests that set their variant
    expression = sys.argv[2].replace("_three_way", "").replace(" and cuda-", " ") if "cuda-" in sys.argv[2] else ""
    if forced in BEHAVIOUR.get("lacks", ()):
        write(path, missing=f"{forced} is not in this build")
        return 1
    write(path, collected=2)
    if BEHAVIOUR.get("hangs") == backend:
        time.sleep(1000)
    for number in range(2):
        test = f"tests/test_it.py::test_{number}[{backend}]"
        write(path, begin=test)
        outcome, says = "passed", ""
        if expression in BEHAVIOUR.get("lacks", ()):
            outcome, says = "skipped", f"Skipped: {expression} is not in this build"
        elif number and BEHAVIOUR.get("fails") == backend:
            outcome, says = "failed", "AssertionError"
        write(path, test=test, outcome=outcome, says=says)
    write(path, served={f"{forced or expression} forward": 2} if forced or expression else {})
    return 1 if BEHAVIOUR.get("fails") == backend else 0


def row(case, op, contender, seconds, **more):
    backend, _, variant = contender.partition(" ")
    ours = backend in ("cuda", "triton")
    found = {
        "case": case,
        "op": op,
        "size": {"name": "base"},
        "batch": {"name": "4x64", "lengths": [64] * 4},
        "dtype": "bfloat16",
        "direction": "forward",
        "contender": contender,
        "ours": ours,
        "backend": backend if ours else None,
        "variant": variant or None if ours else None,
        "served": [variant] if ours and variant else [],
        "same_work": True,
        "note": contender,
        "calls": 10,
        "bound": "memory",
        "error": 1e-3,
        "within_promise": True,
        "peak_bytes": 1,
        "computed_tokens": 256,
        "useful_tokens": 256,
        "flops": 1e6,
        "bytes": 1e6,
    }
    found |= {f"{name}_per_s": found[name] / seconds for name in ("flops", "bytes", "useful_tokens")}
    found |= {"median_s": seconds, "p20_s": seconds, "p80_s": seconds, "turn_medians_s": [seconds]}
    found |= {"roof_s": seconds / 2, "roof_fraction": 0.5}
    if ours:
        found["ratios"] = {"eager": {"median": 1.5, "p20": 1.5, "p80": 1.5}}
    return found | more


def machine(order, say):
    missing = BEHAVIOUR.get("backends", ())
    say(
        machine={
            "device": "cuda",
            "cpu": "a processor",
            "cores": 16,
            "threads": 16,
            "isa_torch": "",
            "isa_kernels": None,
            "gpu": "NVIDIA H100 80GB HBM3",
            "gpu_capability": "9.0",
            "gpu_memory_gib": 79,
        },
        versions={"torch": "2.11.0"},
        backends={name: [name not in missing, "said so"] for name in ("cuda", "triton")},
        choices=[],
        variants=VARIANTS,
    )
    if order["measure_roofs"]:
        say(roofs={"copy": [{"bytes": 2**30, "bytes_per_s": 3e12}], "matmul": {"bfloat16": 8e14}})


def kernels(order, say):
    for op in ("attention", "add_layer_norm", "gelu_ffn"):
        case = f"{op}-{'base' if order['slot'] == 1 else 'large'}-bfloat16-forward-4x64"
        if case in order["done"]:
            continue
        ours = {f"cuda {name}": 1.0 / (1 + i) for i, name in enumerate(VARIANTS.get(op, []))} or {"cuda": 1.0}
        ours = {name: t for name, t in ours.items() if name.replace("cuda", op) not in BEHAVIOUR.get("lacks", ())}
        with open(os.path.join(FOLDER, "journal"), "a") as journal:
            journal.write(case + "\n")
        for contender, seconds in {**ours, "triton": 0.9, "eager": 2.0}.items():
            say(begin=[case, contender])
            say(row=row(case, op, contender, seconds))
        say(done=case)
        if op == "add_layer_norm" and "ends" in BEHAVIOUR:
            end_the_suite(case, BEHAVIOUR["results"])


def end_the_suite(case, results):
    """Once it has written that the case is done: the rows before that are written one by one. Whoever is started in the
    background holds the pipe for as long as it lives.
    """
    os.open(BEHAVIOUR["pipe"], os.O_WRONLY)
    if os.fork() == 0:
        time.sleep(1000)
    while True:
        with open(results) as stream:
            if case in json.load(stream)["done"]["kernels"]:
                break
        time.sleep(0.01)
    os.kill(os.getppid(), BEHAVIOUR["ends"])
    time.sleep(1000)


def models(order, say):
    for name, lengths in (("1x128", [128]), ("mixed", [8, 512])):
        case = f"model-bfloat16-forward-{name}"
        if case in order["done"]:
            continue
        for contender in ("ours, cuda sm90", "HF sdpa"):
            say(begin=[case, contender])
            batch = {"name": name, "lengths": lengths}
            say(model=row(case, None, contender, 1.0, batch=batch, ours=contender.startswith("ours"), model="roberta"))
        say(done=case)


def child():
    with open(sys.argv[2]) as stream:
        order = json.load(stream)

    def say(**event):
        write(order["events"], **event)

    parts = {"machine": machine, "kernels": kernels, "models": models, "prepare": lambda *_: time.sleep(1000)}
    parts[order["part"]](order, say)
    say(finished=True)
    return 0


def setup():
    with open(os.path.join(FOLDER, "package", "_cuda.so"), "w") as stream:
        stream.write(os.environ["TORCH_CUDA_ARCH_LIST"] + " " + os.environ["ROBERTA_KERNELS_CPU"])
    return 0


sys.exit({"pytest": pytest, "benchmarks.gpu_suite.child": child, "setup.py": setup}[sys.argv[1]]())
