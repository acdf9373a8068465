//! Products that may touch nothing but their operands.

use pt_quant::dense::Workspace;
use pt_quant::{
    Absmax, Arithmetic, Block4Matrix, Block4Ref, BlockSize, Codebook, Exec, Isa, ProductOptions, ScaleFormat,
    packed_len,
};

use crate::guard::{Guarded, Side};

#[test]
fn products_touch_nothing_past_their_operands() {
    for (rows, columns, depth) in
        [(1, 1, 64), (1, 5, 192), (3, 9, 576), (5, 4, 128), (13, 7, 320), (65, 13, 64), (2, 3, 70)]
    {
        let len = columns * depth;
        let packed: Vec<u8> = (0..packed_len(len)).map(|index| (index * 37 + 11) as u8).collect();
        let absmax: Vec<f32> = (0..len.div_ceil(64)).map(|index| 1.0 + index as f32 * 0.01).collect();
        let numbers = |len: usize| (0..len).map(|index| (index % 13) as f32 - 6.0).collect::<Vec<f32>>();
        for side in [Side::Start(0), Side::Start(4), Side::End] {
            let packed_side = if let Side::Start(moved) = side { Side::Start(moved / 4) } else { side };
            let (packed, absmax) = (Guarded::new(&packed, packed_side), Guarded::new(&absmax, side));
            let source = Block4Ref::new(&packed, Absmax::F32(&absmax), len, BlockSize::B64, Codebook::nf4()).unwrap();
            let (x, dy) = (numbers(rows * depth), numbers(rows * columns));
            let x16: Vec<u16> = x.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
            let dy16: Vec<u16> = dy.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
            let bf16 = |bits: &[u16]| bits.iter().map(|bits| pt_quant::Bf16(*bits)).collect::<Vec<_>>();
            let (x16, dy16) = (Guarded::new(&bf16(&x16), side), Guarded::new(&bf16(&dy16), side));
            let (x, dy) = (Guarded::new(&x, side), Guarded::new(&dy, side));
            let mut y = Guarded::new(&numbers(rows * columns), side);
            let mut dx = Guarded::new(&numbers(rows * depth), side);
            let (mut packed_back, mut absmax_back) = (Guarded::new(&packed, packed_side), Guarded::new(&absmax, side));
            for isa in Isa::available() {
                let exec = Exec::single().with_isa(isa).unwrap();
                let matrix = Block4Matrix::from_block4(source, columns, depth, ScaleFormat::F32, &exec).unwrap();
                packed_back.fill(0);
                matrix.to_block4_into(&mut packed_back, &mut absmax_back, &exec).unwrap();
                assert_eq!((&*packed_back, &*absmax_back), (&*packed, &*absmax), "{isa}");
                let mut workspace = Workspace::new();
                for arithmetic in [Arithmetic::F32, Arithmetic::Bf16, Arithmetic::Int8] {
                    let options = ProductOptions { arithmetic, ..ProductOptions::default() };
                    matrix.forward(&x, &mut y, rows, &options, &mut workspace, &exec).unwrap();
                    let from_f32 = y.to_vec();
                    matrix.forward(&x16, &mut y, rows, &options, &mut workspace, &exec).unwrap();
                    // The numbers fit in bf16.
                    assert_eq!(&*y, from_f32, "{isa} {arithmetic:?}");
                    if arithmetic != Arithmetic::Int8 {
                        matrix.backward(&dy, &mut dx, rows, &options, &mut workspace, &exec).unwrap();
                        let from_f32 = dx.to_vec();
                        matrix.backward(&dy16, &mut dx, rows, &options, &mut workspace, &exec).unwrap();
                        assert_eq!(&*dx, from_f32, "{isa} {arithmetic:?}");
                    }
                }
            }
        }
    }
}
