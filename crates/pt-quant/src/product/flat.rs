//! Products with a matrix that is not in tiles: its weights are decoded first, a few rows at a time.

use alloc::vec::Vec;
use core::ops::Range;

use super::forward::{PanelSource, Store};
use super::{SlotScratch, as_bf16_bits, as_f32, grown_with};
use crate::dense::{BLOCK_DEPTH, GemmShape, Slot, Workspace, grown};
use crate::simd::dense::{self, DotsFn};
use crate::{Bf16, Block4Ref, Element, Exec, Stores};

/// Weights that are decoded before they are multiplied: 64 KiB in f32.
const DECODED: usize = 16 << 10;

/// A matrix in bitsandbytes' order.
pub(super) struct Flat<'a> {
    pub(super) weights: Block4Ref<'a>,
    pub(super) depth: usize,
    pub(super) is_bf16: bool,
    /// What decodes a part: one thread.
    pub(super) exec: Exec<'a>,
}

/// How weights decoded as `W` become the operand `T` of a dot product.
struct Operand<W, T> {
    buffer: fn(&mut SlotScratch) -> &mut Vec<W>,
    view: fn(&[W]) -> &[T],
}

/// The bits of bf16 numbers.
fn bits<T: Element>(weights: &[T]) -> &[u16] {
    T::as_bf16_bits(weights).unwrap_or_default()
}

impl Flat<'_> {
    /// The weights from `start` on, which are there.
    pub(super) fn decode<W: Element>(&self, start: usize, out: &mut [W]) {
        let outcome = self.weights.dequantize_range_into(start, out, Stores::Cached, &self.exec);
        debug_assert!(outcome.is_ok(), "the shape of the matrix is that of the tensor");
    }

    /// The product with as many rows of activations as the dense dot products take; the depth is not zero.
    pub(super) fn few_rows<X: Element, Y: Element>(
        &self,
        x: &[X],
        product: (&mut [Y], GemmShape, Store<'_>),
        workspace: &mut Workspace,
        exec: &Exec<'_>,
    ) {
        let kernels = dense::kernels(exec.isa());
        let Workspace { product: scratch, slots, .. } = workspace;
        if self.is_bf16 {
            let x = as_bf16_bits(x, &mut scratch.x_bf16);
            let operand = Operand { buffer: |slot| &mut slot.decoded_bf16, view: bits::<Bf16> };
            self.dots(kernels.dots_bf16, x, &operand, product, slots, exec);
        } else {
            let x = as_f32(x, &mut scratch.x_f32, false);
            let operand = Operand { buffer: |slot| &mut slot.panel_f32, view: |weights| weights };
            self.dots(kernels.dots_f32, x, &operand, product, slots, exec);
        }
    }

    fn dots<W: Element, T: Sync, Y: Element>(
        &self,
        dots: DotsFn<T>,
        x: &[T],
        operand: &Operand<W, T>,
        (y, shape, store): (&mut [Y], GemmShape, Store<'_>),
        slots: &mut [Slot],
        exec: &Exec<'_>,
    ) {
        let GemmShape { rows, columns, depth } = shape;
        exec.for_each_columns((y, columns), (DECODED / depth).max(1), slots, |first, mut block, slot| {
            let len = block.len() * depth;
            let weights = grown_with((operand.buffer)(&mut slot.product), len, W::from_f32(0.0));
            self.decode(first * depth, weights);
            let sums = grown(&mut slot.yt, block.len() * rows);
            dots(x, (operand.view)(weights), depth, sums);
            for m in 0..rows {
                let y = block.row(m).iter_mut().zip(sums[m..].iter().step_by(rows));
                y.enumerate().for_each(|(n, (y, sum))| store.part(first + n, core::slice::from_mut(y), &[*sum]));
            }
        });
    }
}

impl PanelSource for Flat<'_> {
    fn is_bf16(&self) -> bool {
        self.is_bf16
    }

    fn decode_f32(&self, rows: Range<usize>, columns: Range<usize>, _: &mut SlotScratch, out: &mut Vec<f32>) {
        let out = grown(out, rows.len() * columns.len());
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len())) {
            self.decode(row * self.depth + columns.start, out);
        }
    }

    fn decode_bf16(&self, rows: Range<usize>, columns: Range<usize>, _: &mut SlotScratch, out: &mut Vec<u32>) {
        let len = columns.len().div_ceil(2);
        let out = grown(out, rows.len() * len);
        let mut weights = [Bf16(0); BLOCK_DEPTH];
        let weights = &mut weights[..columns.len()];
        for (row, out) in rows.zip(out.chunks_exact_mut(len)) {
            self.decode(row * self.depth + columns.start, weights);
            for (out, pair) in out.iter_mut().zip(weights.chunks(2)) {
                *out = u32::from(pair[0].0) | pair.get(1).map_or(0, |high| u32::from(high.0) << 16);
            }
        }
    }
}
