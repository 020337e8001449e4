import sys, json
from pathlib import Path
from train import together
from train.toy import two_stages
from safetensors.torch import load_file
import torch, shutil, time
if __name__ == "__main__":
    size = int(sys.argv[1])
    folder = Path(f"/tmp/par/{size}"); shutil.rmtree(folder, ignore_errors=True)
    t=time.time()
    over = json.loads(sys.argv[2]) if len(sys.argv)>2 else {}
    if size == 1:
        folder.mkdir(parents=True)
        together.whole_run(0, folder, two_stages(folder/"out", **over))
    else:
        together.start(size, together.whole_run, folder, two_stages(folder/"out", **over))
    print("took", time.time()-t)
    rows = [json.loads(l) for l in (folder/"out/log.jsonl").read_text().splitlines()]
    base = [json.loads(l) for l in Path("/tmp/par/1/out/log.jsonl").read_text().splitlines()]
    for a, b in zip(rows, base, strict=True):
        print(a["stage"], a["step"], a["loss"], (a["loss"]-b["loss"])/b["loss"], (a["grad_norm"]-b["grad_norm"])/b["grad_norm"], a["passes"], b["passes"], [a[k]-b[k] for k in ("samples","tokens","image_tokens","supervised")])
    print(sorted(f.name for f in (folder/"out/checkpoints/step-00000011").iterdir()))
