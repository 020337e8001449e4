"""Features of a frozen tower, kept on the disk: every tile goes through the tower once, whatever the number of epochs.

    FOLDER/ab/abcdef....safetensors     the features of one tile, and a checksum

A tile's name is a digest of its prepared patches, its grid, the tower's weights and description, the arithmetic and the
version of torch: whatever could change features leads to another name, and folders can be shared by runs. A tile that
is not there is run alone, so that its bits do not depend on its neighbours in a batch, on what the folder holds, or on
where a run was interrupted.
"""

import hashlib
import os
import secrets
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from opsin.errors import ConfigError, TrainError
from opsin.nn.batch import Batch
from opsin.nn.vision import VisionTower
from opsin.nn.vlm import VLM
from opsin.train.objectives import Loss, Objective, next_token, next_token_from
from opsin.train.prepare import PreparedStage

FEATURES, CHECKSUM = "features", "crc32"


class FeatureCache:
    """The features of one tower in one folder."""

    def __init__(self, folder: Path, tower: VisionTower, *, max_bytes: float, precision: str) -> None:
        """precision: of the passes, as a run names it."""
        self.folder, self.tower, self.max_bytes = folder, tower, max_bytes
        self.hits = self.misses = 0
        self._about_tower = _digest_tower(tower, precision)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.num_bytes = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
        except OSError as error:
            raise TrainError(f"features cannot be kept in {folder}: {error.strerror}") from None

    def features(self, patches: Tensor, grids: Tensor) -> Tensor:
        """What the tower gives for patches (P, C * p * p) and grids (N, 3), tile after tile."""
        parts = []
        for tile, grid in zip(patches.split(grids.prod(dim=1).tolist()), grids.split(1), strict=True):
            file = self._file(tile, grid)
            kept = _read(file)
            if kept is None:
                self.misses += 1
                with torch.no_grad():
                    kept = self.tower(tile, grid)
                self._write(file, kept)
            else:
                self.hits += 1
            parts.append(kept.to(patches.device))
        return torch.cat(parts)

    def _file(self, tile: Tensor, grid: Tensor) -> Path:
        digest = self._about_tower.copy()
        digest.update(repr((tile.device.type, tile.dtype, grid.tolist())).encode())
        digest.update(tile.cpu().contiguous().numpy().data)
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _write(self, file: Path, features: Tensor) -> None:
        """Keep the features of a tile, as long as there is room. One that is lost is made again."""
        if self.num_bytes + features.nbytes > self.max_bytes:
            return
        on_cpu = features.cpu().contiguous()
        temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}.tmp")
        try:
            file.parent.mkdir(exist_ok=True)
            save_file({FEATURES: on_cpu}, temporary, metadata={CHECKSUM: str(_checksum(on_cpu))})
            self.num_bytes += temporary.stat().st_size
            os.replace(temporary, file)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise TrainError(
                f"features cannot be kept in {self.folder}: {error}. Make room, or lower max_gib"
            ) from None


def with_cache(objective: Objective, module: nn.Module, prepared: PreparedStage, precision: str) -> Objective:
    """The objective of a stage, with features from the disk where the stage keeps them.

    Raises ConfigError where features are not the same in every step.
    """
    stage = prepared.stage
    if stage.cache_features is None:
        return objective
    if objective is not next_token or not isinstance(module, VLM):
        raise ConfigError(
            f"stage {stage.name!r}: cache_features is for next-token training; an objective of your own can pass rows "
            "to next_token_from"
        )
    if moving := [name for name in prepared.trainable.names if name.startswith("vision.")]:
        raise ConfigError(
            f"stage {stage.name!r}: cache_features keeps what the vision tower computes, but the tower trains "
            f"({len(moving)} tensors, such as {moving[0]!r}). Leave one of the two out"
        )
    if stage.drop_path:
        raise ConfigError(f"stage {stage.name!r}: with drop_path the tower gives other features each time; set it to 0")
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ConfigError(
            f"stage {stage.name!r}: cache_features is for one process. Several that hold parts of a tower must run it "
            "together, but each would find other tiles in the cache"
        )
    cache = FeatureCache(
        Path(stage.cache_features.folder),
        module.vision,
        max_bytes=stage.cache_features.max_gib * 2**30,
        precision=precision,
    )

    def cached(vlm: VLM, batch: Batch) -> Loss:
        if batch.patches is None:
            return next_token_from(vlm, batch, rows=None)
        assert batch.grids is not None
        return next_token_from(vlm, batch, rows=vlm.connector(cache.features(batch.patches, batch.grids), batch.grids))

    return cached


def _read(file: Path) -> Tensor | None:
    """The features in a file; None where there is none, or none that is whole."""
    try:
        with safe_open(file, framework="pt") as stored:
            features: Tensor = stored.get_tensor(FEATURES)
            whole = (stored.metadata() or {}).get(CHECKSUM) == str(_checksum(features))
    except (OSError, SafetensorError):
        return None
    return features if whole else None


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data)


def _digest_tower(tower: VisionTower, precision: str) -> "hashlib._Hash":
    digest = hashlib.sha256(repr((tower.config.model_dump_json(), precision, torch.__version__)).encode())
    for name, tensor in tower.state_dict().items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest
