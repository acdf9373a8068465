//! The scales of a matrix in tiles: how they are held, and where products get them in f32.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use crate::dense::grown;
use crate::simd::product::{GROUP, Group, TILE_ROWS};
use crate::{Absmax, Bf16, Block4Ref, BlockSize, DynamicMap, Exec, NestedAbsmaxBuf};

/// In which format a [`Block4Matrix`](crate::Block4Matrix) holds the scales of its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScaleFormat {
    /// In f32, double quantization undone: 0.56 bytes a weight in blocks of 64. Products use the very weights that dequantizing gives.
    #[default]
    F32,
    /// Rounded to bf16: 0.53 bytes a weight in blocks of 64, with a relative error of each weight up to 2^-9.
    Bf16,
    /// As the source has them. In 8 bits where they are doubly quantized: 0.516 bytes a weight in blocks of 64, and products with the bits of
    /// [`F32`](Self::F32), because a panel's scales are decoded before they are used.
    AsStored,
}

/// Scales of the 4 rows of each group, `[num_tiles, groups_per_row]`; those of rows that the last tile lacks are zero.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scales {
    F32(Vec<[f32; TILE_ROWS]>),
    Bf16(Vec<[Bf16; TILE_ROWS]>),
    Nested(Nested),
}

/// Doubly quantized: a scale is `map[code] · absmax + offset`, each operation rounded.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Nested {
    /// `[num_tiles, groups_per_row]`
    codes: Vec<[u8; TILE_ROWS]>,
    /// In the order of the source: one for `1 << shift` groups, counted row by row.
    absmax: Vec<f32>,
    shift: u32,
    /// `None`: the values of [`DynamicMap::signed`], which every file of bitsandbytes has.
    map: Option<Box<[f32; 256]>>,
    offset: f32,
    /// Codes that share an `absmax`.
    block_size: BlockSize,
    num_rows: usize,
}

impl Scales {
    /// The scales of a matrix of `num_rows` rows and `groups` groups a row. The memory of `self` is used again where its format is the same.
    pub(super) fn fill(
        &mut self,
        format: ScaleFormat,
        source: Block4Ref<'_>,
        (num_rows, groups): (usize, usize),
        exec: &Exec<'_>,
    ) {
        let rows = RowScales { source, num_rows, groups };
        match (format, source.absmax()) {
            (ScaleFormat::AsStored, Absmax::Nested(nested)) => {
                let (mut codes, mut absmax) = match core::mem::take(self) {
                    Self::Nested(Nested { codes, absmax, .. }) => (codes, absmax),
                    _ => (vec![], vec![]),
                };
                rows.fill(&mut codes, |index| nested.codes()[index], exec);
                absmax.clear();
                absmax.extend_from_slice(nested.absmax());
                let groups_per_scale = source.block_size().get() / GROUP * nested.block_size().get();
                *self = Self::Nested(Nested {
                    codes,
                    absmax,
                    shift: groups_per_scale.trailing_zeros(),
                    map: (nested.map() != DynamicMap::signed().values()).then(|| Box::new(*nested.map())),
                    offset: nested.offset(),
                    block_size: nested.block_size(),
                    num_rows,
                });
            }
            (ScaleFormat::F32 | ScaleFormat::AsStored, absmax) => {
                let mut scales = if let Self::F32(scales) = core::mem::take(self) { scales } else { vec![] };
                match absmax {
                    Absmax::F32(absmax) => rows.fill(&mut scales, |index| absmax[index], exec),
                    absmax => rows.fill(&mut scales, |index| absmax.get(index).unwrap_or(0.0), exec),
                }
                *self = Self::F32(scales);
            }
            (ScaleFormat::Bf16, absmax) => {
                let mut scales = if let Self::Bf16(scales) = core::mem::take(self) { scales } else { vec![] };
                rows.fill(&mut scales, |index| Bf16::from_f32(absmax.get(index).unwrap_or(0.0)), exec);
                *self = Self::Bf16(scales);
            }
        }
    }

    /// The scales of some groups of some tiles in f32, `[tiles, groups_per_row]`; those of other groups may be anything. `buffer` holds what must be
    /// decoded. Every product gets its scales here.
    pub(super) fn of_tiles<'a>(
        &'a self,
        tiles: Range<usize>,
        groups: Range<usize>,
        groups_per_row: usize,
        buffer: &'a mut Vec<[f32; TILE_ROWS]>,
    ) -> &'a [[f32; TILE_ROWS]] {
        let whole = tiles.start * groups_per_row..tiles.end * groups_per_row;
        if let Self::F32(scales) = self {
            return &scales[whole];
        }
        let buffer = grown(buffer, whole.len());
        for (tile, out) in tiles.zip(buffer.chunks_exact_mut(groups_per_row)) {
            self.decode(tile, groups.clone(), groups_per_row, &mut out[groups.clone()]);
        }
        buffer
    }

    fn decode(&self, tile: usize, groups: Range<usize>, groups_per_row: usize, out: &mut [[f32; TILE_ROWS]]) {
        let first = tile * groups_per_row + groups.start;
        match self {
            Self::F32(scales) => out.copy_from_slice(&scales[first..][..out.len()]),
            Self::Bf16(scales) => {
                out.iter_mut().zip(&scales[first..]).for_each(|(out, scales)| *out = scales.map(Bf16::to_f32));
            }
            Self::Nested(nested) => {
                let rows = core::array::from_fn(|row| {
                    (tile * TILE_ROWS + row).min(nested.num_rows - 1) * groups_per_row + groups.start
                });
                nested.decode(&nested.codes[first..][..out.len()], rows, out);
                for missing in nested.num_rows.saturating_sub(tile * TILE_ROWS)..TILE_ROWS {
                    out.iter_mut().for_each(|scales| scales[missing] = 0.0);
                }
            }
        }
    }

    /// The scale of each block, in the order of bitsandbytes.
    pub(super) fn copy_blocks(
        &self,
        (groups_per_row, groups_per_block): (usize, usize),
        absmax: &mut [f32],
        exec: &Exec<'_>,
    ) {
        let blocks_of_tile = TILE_ROWS * groups_per_row;
        if groups_per_block == 1 {
            let tiles_per_task = tiles_per_task(groups_per_row);
            exec.for_each_chunk(absmax, blocks_of_tile * tiles_per_task, |index, absmax| {
                let mut scales = vec![[0.0; TILE_ROWS]; groups_per_row];
                for (offset, absmax) in absmax.chunks_mut(blocks_of_tile).enumerate() {
                    self.decode(index * tiles_per_task + offset, 0..groups_per_row, groups_per_row, &mut scales);
                    for (row, absmax) in absmax.chunks_exact_mut(groups_per_row).enumerate() {
                        absmax.iter_mut().zip(&scales).for_each(|(out, scales)| *out = scales[row]);
                    }
                }
            });
            return;
        }
        for (index, out) in absmax.iter_mut().enumerate() {
            // The first group of each block, whichever row it is in.
            let (row, group) = (index * groups_per_block / groups_per_row, index * groups_per_block % groups_per_row);
            let mut scales = [[0.0; TILE_ROWS]];
            self.decode(row / TILE_ROWS, group..group + 1, groups_per_row, &mut scales);
            *out = scales[0][row % TILE_ROWS];
        }
    }

    /// Scales in 8 bits as they were given, where they are held so.
    pub(super) fn to_nested(
        &self,
        (groups_per_row, groups_per_block): (usize, usize),
        num_blocks: usize,
    ) -> Option<NestedAbsmaxBuf> {
        let Self::Nested(nested) = self else { return None };
        let code = |index: usize| {
            let (row, group) = (index * groups_per_block / groups_per_row, index * groups_per_block % groups_per_row);
            nested.codes[row / TILE_ROWS * groups_per_row + group][row % TILE_ROWS]
        };
        let Nested { absmax, offset, block_size, .. } = nested;
        let map = Box::new(*nested.map());
        NestedAbsmaxBuf::new((0..num_blocks).map(code).collect(), absmax.clone(), map, *offset, *block_size).ok()
    }

    pub(super) fn num_bytes(&self) -> usize {
        match self {
            Self::F32(scales) => size_of_val(&scales[..]),
            Self::Bf16(scales) => size_of_val(&scales[..]),
            Self::Nested(Nested { codes, absmax, map, .. }) => {
                let map = map.as_ref().map_or(0, |map| size_of_val(&map[..]));
                size_of_val(&codes[..]) + size_of_val(&absmax[..]) + map
            }
        }
    }
}

impl Default for Scales {
    fn default() -> Self {
        Self::F32(vec![])
    }
}

impl Nested {
    fn map(&self) -> &[f32; 256] {
        self.map.as_deref().unwrap_or(DynamicMap::signed().values())
    }

    /// Some groups of a tile, whose rows begin with the groups `rows`, counted row by row.
    fn decode(&self, codes: &[[u8; TILE_ROWS]], rows: [usize; TILE_ROWS], out: &mut [[f32; TILE_ROWS]]) {
        let (map, absmax) = (self.map(), &self.absmax[..]);
        for (group, (out, codes)) in out.iter_mut().zip(codes).enumerate() {
            // Two roundings, as bitsandbytes: no fused multiply-add.
            *out = core::array::from_fn(|row| {
                map[usize::from(codes[row])] * absmax[(rows[row] + group) >> self.shift] + self.offset
            });
        }
    }
}

/// The scales of a tensor as a matrix of `num_rows` rows and `groups` groups a row.
struct RowScales<'a> {
    source: Block4Ref<'a>,
    num_rows: usize,
    groups: usize,
}

impl RowScales<'_> {
    /// Fills `[num_tiles, groups]` with `of_block(index of the block)`; what rows that are not there have stays as zero as it begins.
    fn fill<T: Copy + Default + Send>(
        &self,
        out: &mut Vec<[T; TILE_ROWS]>,
        of_block: impl Fn(usize) -> T + Sync,
        exec: &Exec<'_>,
    ) {
        // A power of two, as all block sizes are.
        let shift = (self.source.block_size().get() / GROUP).trailing_zeros();
        out.resize(self.num_rows.div_ceil(TILE_ROWS) * self.groups, [T::default(); TILE_ROWS]);
        let tiles_per_task = tiles_per_task(self.groups);
        exec.for_each_chunk(out, self.groups * tiles_per_task, |index, out| {
            for (offset, out) in out.chunks_exact_mut(self.groups).enumerate() {
                let first = (index * tiles_per_task + offset) * TILE_ROWS;
                for row in 0..TILE_ROWS.min(self.num_rows - first) {
                    let first = (first + row) * self.groups;
                    let scales = out.iter_mut().enumerate();
                    scales.for_each(|(group, out)| out[row] = of_block((first + group) >> shift));
                }
            }
        });
    }
}

/// Tiles of a task of the rearrangement: with 64 KiB of codes, handing it out is cheap.
pub(super) fn tiles_per_task(groups_per_row: usize) -> usize {
    ((64 << 10) / (groups_per_row * size_of::<Group>())).max(1)
}
