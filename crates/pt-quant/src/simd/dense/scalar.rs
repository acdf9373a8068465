//! The block products in plain Rust: what the other files have to agree with.

use super::{Kernels, Panel, Tiles, check_block, check_dots, pair, widen};

const LANES: usize = 8;

pub(super) static KERNELS: Kernels = Kernels { dots_f32, dots_bf16, few: None, lanes: LANES, block_f32, block_bf16 };

fn block_f32(tiles: &Tiles<'_, f32>, panel: &Panel<'_, f32>, yt: &mut [f32]) {
    block(tiles, panel, yt, |y, x, w| y + x * w);
}

fn block_bf16(tiles: &Tiles<'_, u32>, panel: &Panel<'_, u32>, yt: &mut [f32]) {
    block(tiles, panel, yt, |y, x, w| {
        let ((x0, x1), (w0, w1)) = (pair(x), pair(w));
        y + x0 * w0 + x1 * w1
    });
}

fn block<T: Copy>(tiles: &Tiles<'_, T>, panel: &Panel<'_, T>, yt: &mut [f32], add: impl Fn(f32, T, T) -> f32) {
    check_block(LANES, tiles, panel, yt);
    let row_len = tiles.num_tiles * LANES;
    for row in 0..panel.rows {
        for tile in 0..tiles.num_tiles {
            let mut sums = [0.0; LANES];
            for d in 0..panel.depth {
                let w = panel.data[row * panel.row_stride + d * panel.depth_stride];
                let x = &tiles.data[(tile * tiles.depth + panel.first + d) * LANES..][..LANES];
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = add(*sum, *x, w);
                }
            }
            let y = &mut yt[row * row_len + tile * LANES..][..LANES];
            for (y, sum) in y.iter_mut().zip(sums) {
                *y += sum;
            }
        }
    }
}

fn dots_f32(x: &[f32], w: &[f32], depth: usize, out: &mut [f32]) {
    dots(x, w, depth, out, |value| value);
}

fn dots_bf16(x: &[u16], w: &[u16], depth: usize, out: &mut [f32]) {
    dots(x, w, depth, out, widen);
}

fn dots<T: Copy>(x: &[T], w: &[T], depth: usize, out: &mut [f32], to_f32: impl Fn(T) -> f32) {
    let num_x = check_dots(x, w, depth, out);
    for (w, out) in w.chunks_exact(depth).zip(out.chunks_exact_mut(num_x)) {
        for (x, out) in x.chunks_exact(depth).zip(out) {
            // Partial sums by lane, as the vector kernels have them: shorter chains of rounding.
            let mut sums = [0.0; LANES];
            for (d, (x, w)) in x.iter().zip(w).enumerate() {
                sums[d % LANES] += to_f32(*x) * to_f32(*w);
            }
            *out = sums.iter().sum();
        }
    }
}
