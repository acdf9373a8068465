//! Two fine-tunes of one matrix as 1-bit deltas, served over the base they share:
//! `cargo run --release -p pt-quant --example compress_fine_tune`

use pt_quant::delta::{BitDelta, DeltaArithmetic, DeltaMatrix, DeltaWorkspace, ScaleAxis, add_tenants};
use pt_quant::dense::{GemmShape, Output, Workspace, gemm_nt};
use pt_quant::{Exec, QuantError};

fn main() -> Result<(), QuantError> {
    let exec = Exec::new();
    let (out_features, in_features) = (512, 576);
    let number = |seed: usize| move |index: usize| ((index * seed) as f32 * 0.618_034).fract() - 0.5;
    let base: Vec<f32> = (0..out_features * in_features).map(number(1)).collect();
    let tuned = [3, 5].map(|seed| -> Vec<f32> {
        base.iter().enumerate().map(|(index, base)| base + 0.02 * number(seed)(index)).collect()
    });

    let mut deltas = Vec::new();
    for tuned in &tuned {
        let delta = BitDelta::fit(&base, tuned, out_features, in_features, ScaleAxis::Row, &exec)?;
        deltas.push(DeltaMatrix::new(delta.as_ref(), &exec)?);
    }
    println!("a fine-tune takes {} bytes instead of {}", deltas[0].size_in_bytes(), 4 * base.len());

    // Three requests: one for each fine-tune, one for the base. The base is multiplied once for all.
    let x: Vec<f32> = (0..3 * in_features).map(number(11)).collect();
    let mut y = vec![0f32; 3 * out_features];
    let shape = GemmShape { rows: 3, columns: out_features, depth: in_features };
    gemm_nt(&x, &base, &mut y, shape, Output::Replace, &mut Workspace::new(), &exec)?;
    let tenants = [Some(0), Some(1), None];
    let refs: Vec<&DeltaMatrix> = deltas.iter().collect();
    add_tenants(&refs, &tenants, &x, &mut y, DeltaArithmetic::F32, &mut DeltaWorkspace::new(), &exec)?;
    for (row, tenant) in y.chunks(out_features).zip(tenants) {
        println!("{tenant:?}: {:.4} {:.4} {:.4}", row[0], row[1], row[2]);
    }
    Ok(())
}
