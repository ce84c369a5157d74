"""What a model that hears is given: sound, and beside it the text that was said where it writes that down."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekit.model.towers import chosen_tower, tower_name

HEARD = ("input_features", "input_values")  # a spectrum, and the wave itself
SAMPLE = 8000  # values of the wave, half a second, that shows what a model consists of
FRAMES = 128  # of its spectrum


@dataclass(frozen=True)
class Heard:
    """Sound, and the tokens that were said, sample by sample: as far as a walk asks, one tensor of the sound.

    sound: (samples, ...), floating point, as the feature extractor makes it. said: tokens (samples, length), of which
    the first is the one that a decoder begins with
    """

    sound: Tensor
    said: Tensor

    def __len__(self) -> int:
        return len(self.sound)

    def __getitem__(self, chosen: Any) -> "Heard":
        return Heard(self.sound[chosen], self.said[chosen])

    @property
    def shape(self) -> torch.Size:
        """Of the sound."""
        return self.sound.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the sound."""
        return self.sound.dtype

    @property
    def ndim(self) -> int:
        """Of the sound."""
        return self.sound.ndim

    def is_floating_point(self) -> bool:
        """It is sound."""
        return True

    def numpy(self) -> Any:
        """All numbers in one row, for a digest."""
        return torch.cat([self.sound.flatten().float(), self.said.flatten().float()]).numpy()


@dataclass(frozen=True)
class SoundReader:
    """What makes of sound what a model hears, and of words tokens; no tokenizer where it writes nothing down."""

    extractor: Any
    tokenizer: Any = None

    def save_pretrained(self, folder: Any) -> None:
        """Write both into a folder."""
        for each in (self.extractor, self.tokenizer):
            if each is not None:
                each.save_pretrained(folder)


def hears(model: Any) -> bool:
    """Whether a model, or its chosen tower, is given sound, and not text alone."""
    if tower_name(model):
        return sound_of(chosen_tower(model)) != ""
    return getattr(model, "main_input_name", None) in HEARD and sound_of(model) != ""


def sound_of(module: Any) -> str:
    """What a module's forward calls the sound that it is given first; empty: it is given none."""
    return next((name for name in list(inspect.signature(module.forward).parameters)[:1] if name in HEARD), "")


def given_sound(model: Any, given: Tensor | Heard) -> dict[str, Tensor]:
    """What a model's forward is given for sound, and for what was said where there is a decoder."""
    sound, said = (given.sound, given.said) if isinstance(given, Heard) else (given, None)
    device = next((p.device for p in model.parameters() if not p.is_meta), sound.device)
    found = {sound_of(model): sound.to(device, model.dtype)}
    if said is None and getattr(model.config, "is_encoder_decoder", False) and not tower_name(model):
        said = torch.full((len(sound), 1), begins_with(model))
    return found if said is None else found | {"decoder_input_ids": said.to(device)}


def begins_with(model: Any) -> int:
    """The token that a decoder begins with."""
    config = model.config.get_text_config(decoder=True)
    found = [getattr(each, "decoder_start_token_id", None) for each in (model.config, config)]
    return next((token for token in [*found, getattr(config, "bos_token_id", None)] if token is not None), 0)


def sample_sound(model: Any) -> Tensor:
    """A little silence as the model, or its chosen tower, is given it, on its device and in its dtype."""
    tower = chosen_tower(model)
    config = tower.config
    config = getattr(config, "encoder_config", None) or getattr(config, "audio_config", None) or config
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    bins = next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 80)
    places = getattr(config, "max_source_positions", 0)
    if sound_of(tower) == "input_values":
        spectrum = hasattr(config, "num_mel_bins") and hasattr(config, "max_length") and config.num_mel_bins
        shape = (1, config.max_length, bins) if spectrum and hasattr(config, "frequency_stride") else (1, SAMPLE)
    elif any(name.endswith("conv1") and module.in_channels == bins for name, module in _convolutions(tower)):
        shape = (1, bins, 2 * places)  # Whisper's, of one length alone
    else:
        shape = (1, FRAMES, bins)
    return torch.zeros(shape, dtype=tower.dtype, device=tower.device)


def _convolutions(tower: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in tower.named_modules() if isinstance(module, torch.nn.Conv1d)]
