//! A linear layer in 4 bits: `cargo run --release -p pt-quant --example multiply`

use pt_quant::dense::Workspace;
use pt_quant::{Arithmetic, Block4, Block4Matrix, BlockSize, Codebook, Exec, ProductOptions, QuantError, ScaleFormat};

fn main() -> Result<(), QuantError> {
    let (exec, mut workspace) = (Exec::new(), Workspace::new());
    let (out_features, in_features, rows) = (1536, 576, 4);
    // Numbers without a pattern that quantizing would hide.
    let number = |index: usize| (index as f32 * 0.618_034).fract() - 0.5;
    let dense: Vec<f32> = (0..out_features * in_features).map(number).collect();
    let x: Vec<f32> = (0..rows * in_features).map(|index| number(7 * index)).collect();

    let weights = Block4::quantize(&dense, BlockSize::B64, Codebook::nf4(), &exec)?;
    let matrix = Block4Matrix::from_block4(weights.as_ref(), out_features, in_features, ScaleFormat::F32, &exec)?;
    println!(
        "{} on {} threads: {} bytes instead of {}",
        exec.isa(),
        exec.num_threads(),
        matrix.num_bytes(),
        4 * dense.len()
    );

    let mut y = [vec![0f32; rows * out_features], vec![0f32; rows * out_features]];
    for (y, arithmetic) in y.iter_mut().zip([Arithmetic::F32, Arithmetic::Int8]) {
        let options = ProductOptions { arithmetic, ..ProductOptions::default() };
        matrix.forward(&x, y, rows, &options, &mut workspace, &exec)?;
    }
    let [exact, int8] = &y;
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>().sqrt();
    let error = norm(&mut exact.iter().zip(int8).map(|(a, b)| a - b)) / norm(&mut exact.iter().copied());
    println!("W4A8 differs from f32 arithmetic by {:.2} %", 100.0 * error);

    let mut dx = vec![0f32; rows * in_features];
    matrix.backward(exact, &mut dx, rows, &ProductOptions::default(), &mut workspace, &exec)?;
    println!("the gradient to the input starts with {:.4}", dx[0]);
    Ok(())
}
