"""Stock openai-whisper's encoder as an ONNX file, for `--candidate onnx:FILE`.

python export_onnx.py encoder.safetensors encoder.onnx
"""

import sys

import torch

import weights
from validation.reference import stock_encoder

checkpoint = weights.load(sys.argv[1], encoder_only=True)
dims = checkpoint.dims
mel = torch.zeros(1, dims.n_mels, 2 * dims.n_audio_ctx)
torch.onnx.export(
    stock_encoder(checkpoint),
    (mel,),
    sys.argv[2],
    input_names=["mel"],
    output_names=["ln_post"],
    dynamo=True,
)
