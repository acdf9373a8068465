//! Attention of one new token per row over a cache of keys and values.

use crate::fused::{is_bf16, is_fusable, ptr};
use crate::{Result, TensorError};
use std::ffi::{c_int, c_void};
use tch::{Tensor, no_grad};

/// Where a row's new token goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSlot {
    /// Row of the cache.
    pub row: i64,
    /// Position of the token in its row: so many tokens stand before it.
    pub position: i64,
}

/// A [`CacheSlot`] as the kernel reads it.
#[repr(C)]
struct Slot {
    row: i64,
    position: i64,
    first: i64,
}

unsafe extern "C" {
    fn pt_decode_attention(
        is_bf16: c_int,
        query: *const c_void,
        key: *const c_void,
        value: *const c_void,
        keys: *mut c_void,
        values: *mut c_void,
        out: *mut c_void,
        slots: *const Slot,
        rows: i64,
        capacity: i64,
        heads: i64,
        kv_heads: i64,
        dim: i64,
        scale: f32,
    );
}

/// Writes each new token's key and value into the cache, and attends from it to what stands there up to it.
///
/// # Shapes
/// `query: [tokens, num_heads, head_dim]`, `key`, `value`: `[tokens, num_kv_heads, head_dim]`, `keys`, `values`:
/// `[cache_rows, capacity, num_kv_heads, head_dim]`, one slot a token, each of another row; returns query's shape. A
/// token sees at most the last `window` tokens where a window is given, itself included. Without gradients.
///
/// # Errors
/// [`TensorError::Shape`] and [`TensorError::Argument`] when shapes, slots or window do not fit.
pub fn decode_attention(
    (query, key, value): (&Tensor, &Tensor, &Tensor),
    (keys, values): (&Tensor, &Tensor),
    slots: &[CacheSlot],
    scale: f64,
    window: Option<i64>,
) -> Result<Tensor> {
    let tokens = slots.len() as i64;
    let (_, heads, dim) = query.size3().map_err(|_| TensorError::shape("query", query, "[tokens, heads, head_dim]"))?;
    let kv_heads = key.size().get(1).copied().unwrap_or(0);
    if query.size()[0] != tokens || kv_heads == 0 || heads % kv_heads != 0 {
        return Err(TensorError::shape("query", query, format!("[{tokens}, a multiple of {kv_heads}, {dim}]")));
    }
    for (name, tensor) in [("key", key), ("value", value)] {
        if tensor.size() != [tokens, kv_heads, dim] {
            return Err(TensorError::shape(name, tensor, format!("[{tokens}, {kv_heads}, {dim}]")));
        }
    }
    let (cache_rows, capacity) = match keys.size()[..] {
        [rows, capacity, own_heads, own_dim] if own_heads == kv_heads && own_dim == dim => (rows, capacity),
        _ => return Err(TensorError::shape("keys", keys, format!("[rows, capacity, {kv_heads}, {dim}]"))),
    };
    if values.size() != keys.size() {
        return Err(TensorError::shape("values", values, format!("{:?} as keys", keys.size())));
    }
    if window.is_some_and(|window| window < 1) {
        return Err(TensorError::argument("window", window.unwrap_or(0), "at least 1 token"));
    }
    if let Some(slot) =
        slots.iter().find(|slot| !(0..cache_rows).contains(&slot.row) || !(0..capacity).contains(&slot.position))
    {
        let expected = format!("a row below {cache_rows} and a position below {capacity}");
        return Err(TensorError::argument("slots", format!("{slot:?}"), &expected));
    }
    let first = |slot: &CacheSlot| window.map_or(0, |window| (slot.position + 1 - window).max(0));
    if !is_fusable(&[query, key, value, keys, values]) || !keys.is_contiguous() || !values.is_contiguous() {
        return row_by_row((query, key, value), (keys, values), slots, first, scale);
    }
    let [query, key, value] = [query, key, value].map(|t| t.detach().contiguous());
    let out = no_grad(|| query.empty_like());
    let slots: Vec<Slot> =
        slots.iter().map(|slot| Slot { row: slot.row, position: slot.position, first: first(slot) }).collect();
    // SAFETY: contiguous CPU tensors of one kind and the sizes given; every slot lies within the caches and its first
    // token not behind its position, all checked above. They outlive the call, which keeps no pointer.
    unsafe {
        pt_decode_attention(
            is_bf16(&query),
            ptr(&query),
            ptr(&key),
            ptr(&value),
            ptr(keys),
            ptr(values),
            ptr(&out),
            slots.as_ptr(),
            tokens,
            capacity,
            heads,
            kv_heads,
            dim,
            scale as f32,
        );
    }
    Ok(out)
}

/// The same with libtorch's attention; neighbouring rows at one position go in one call.
fn row_by_row(
    (query, key, value): (&Tensor, &Tensor, &Tensor),
    (keys, values): (&Tensor, &Tensor),
    slots: &[CacheSlot],
    first: impl Fn(&CacheSlot) -> i64,
    scale: f64,
) -> Result<Tensor> {
    let (heads, dim, kv_heads) = (query.size()[1], query.size()[2], key.size()[1]);
    let mut outputs = Vec::new();
    let mut token = 0;
    let is_next = |a: &CacheSlot, b: &CacheSlot| b.row == a.row + 1 && b.position == a.position;
    for run in slots.chunk_by(is_next) {
        let (slot, count) = (run[0], run.len() as i64);
        for (cache, new) in [(keys, key), (values, value)] {
            let mut place = cache.narrow(0, slot.row, count).narrow(1, slot.position, 1);
            place.f_copy_(&new.narrow(0, token, count).unsqueeze(1))?;
        }
        let start = first(&slot);
        let seen = |cache: &Tensor| {
            cache.narrow(0, slot.row, count).narrow(1, start, slot.position + 1 - start).transpose(1, 2)
        };
        // A key head serves a run of query heads: they take the place of query positions.
        let grouped = query.narrow(0, token, count).view([count, kv_heads, heads / kv_heads, dim]);
        let (mask, is_causal) = (None::<&Tensor>, false);
        let output = Tensor::f_scaled_dot_product_attention(
            &grouped,
            &seen(keys),
            &seen(values),
            mask,
            0.0,
            is_causal,
            scale,
            false,
        )?;
        outputs.push(output.reshape([count, heads, dim]));
        token += count;
    }
    Ok(if outputs.is_empty() { query.shallow_clone() } else { Tensor::cat(&outputs, 0) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn the_kernel_equals_libtorch_in_f64() {
        let _lock = crate::random::test_lock();
        let slots = [(0, 0), (2, 90), (3, 90), (1, 17)].map(|(row, position)| CacheSlot { row, position });
        for (dim, heads, kv_heads, window) in [(64, 9, 3, None), (20, 6, 1, Some(30)), (16, 2, 2, Some(1))] {
            for (kind, tolerance) in [(Kind::Float, 2e-6), (Kind::BFloat16, 1e-2)] {
                let draw = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind);
                let new = [draw(&[4, heads, dim]), draw(&[4, kv_heads, dim]), draw(&[4, kv_heads, dim])];
                let caches = [draw(&[4, 100, kv_heads, dim]), draw(&[4, 100, kv_heads, dim])];
                let wide = |t: &Tensor| t.to_kind(Kind::Double);
                let (wide_new, wide_caches) = (new.each_ref().map(wide), caches.each_ref().map(wide));
                let run = |[q, k, v]: &[Tensor; 3], [keys, values]: &[Tensor; 2]| {
                    decode_attention((q, k, v), (keys, values), &slots, 0.2, window).unwrap()
                };
                let (out, want) = (run(&new, &caches), run(&wide_new, &wide_caches));
                let error = (wide(&out) - &want).abs().max().double_value(&[]);
                assert!(error < tolerance * want.abs().max().double_value(&[]).max(1.0), "{dim} {kind:?}: {error}");
                for (own, wide_cache) in caches.iter().zip(&wide_caches) {
                    assert!(wide(own).equal(wide_cache), "the caches hold the new tokens");
                }
            }
        }
    }

    #[test]
    fn slots_outside_the_cache_are_refused() {
        let zeros = |size: &[i64]| Tensor::zeros(size, (Kind::Float, Device::Cpu));
        let (q, kv, cache) = (zeros(&[1, 2, 8]), zeros(&[1, 1, 8]), zeros(&[2, 5, 1, 8]));
        let run = |row, position, window| {
            decode_attention((&q, &kv, &kv), (&cache, &cache), &[CacheSlot { row, position }], 1.0, window)
        };
        assert!(run(1, 4, None).is_ok());
        for (row, position, window) in [(2, 0, None), (0, 5, None), (-1, 0, None), (0, 0, Some(0))] {
            assert!(run(row, position, window).is_err());
        }
    }
}
