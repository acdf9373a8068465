//! Quantizes the matrices of a safetensors file to NF4, as bitsandbytes saves them:
//! `cargo run --release -p pt-quant --features safetensors --example quantize_file -- model.safetensors nf4.safetensors`

use std::error::Error;

use pt_quant::formats::bitsandbytes::{SourceDtype, tensors};
use pt_quant::{Bf16, Block4, BlockSize, Codebook, Exec};
use safetensors::{Dtype, SafeTensors, serialize_to_file};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [input, output] = &args[..] else {
        return Err("two arguments are expected: the file to read and the file to write".into());
    };
    let (bytes, exec) = (std::fs::read(input)?, Exec::new());
    let file = SafeTensors::deserialize(&bytes)?;
    let mut blocks = Vec::new();
    for (name, tensor) in
        file.iter().filter(|(name, tensor)| name.ends_with("_proj.weight") && tensor.shape().len() == 2)
    {
        let (weights, dtype) = match tensor.dtype() {
            Dtype::BF16 => {
                let numbers: Vec<Bf16> =
                    tensor.data().chunks_exact(2).map(|b| Bf16(u16::from_le_bytes([b[0], b[1]]))).collect();
                (Block4::quantize(&numbers, BlockSize::B64, Codebook::nf4(), &exec)?, SourceDtype::BFloat16)
            }
            Dtype::F32 => {
                let numbers: Vec<f32> =
                    tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                (Block4::quantize(&numbers, BlockSize::B64, Codebook::nf4(), &exec)?, SourceDtype::Float32)
            }
            other => return Err(format!("{name} is {other:?}, expected F32 or BF16").into()),
        };
        blocks.push((name, tensor.shape().to_vec(), dtype, weights.double_quantize(&exec)?));
    }
    let mut saved = Vec::new();
    for (name, shape, dtype, weights) in &blocks {
        saved.extend(tensors(name, &weights.as_ref(), shape, *dtype)?);
    }
    println!("{} matrices quantized", blocks.len());
    serialize_to_file(saved, None, output.as_ref())?;
    Ok(())
}
