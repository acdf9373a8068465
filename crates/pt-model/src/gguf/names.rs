//! From the tensor names and layouts of GGUF to those of Hugging Face checkpoints.

use crate::config::{Architecture, ModelConfig};

/// What llama.cpp's converter did to a tensor, to be undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// As in the checkpoint.
    Same,
    /// Rows of each head interleaved: rotary pairs are neighbours there and half a head apart in Hugging Face's layout.
    InterleavedHeads {
        /// Heads that the rows are split into.
        num_heads: i64,
    },
    /// Transposed: GPT-2's `Conv1D` weights are `[in, out]` in the checkpoint.
    Transposed,
}

/// A tensor's place in the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placement {
    /// Name in the Hugging Face checkpoint.
    pub(crate) name: String,
    /// What is to be undone.
    pub(crate) layout: Layout,
}

/// Where a GGUF tensor belongs, or `None` for one that no checkpoint of that architecture has.
pub(crate) fn placement(gguf_name: &str, config: &ModelConfig) -> Option<Placement> {
    let is_gpt2 = config.architecture == Architecture::Gpt2;
    let same = |name: String| Some(Placement { name, layout: Layout::Same });
    let Some(rest) = gguf_name.strip_prefix("blk.") else {
        let name = match (gguf_name, is_gpt2) {
            ("output.weight", _) => "lm_head.weight",
            ("token_embd.weight", false) => "model.embed_tokens.weight",
            ("output_norm.weight", false) => "model.norm.weight",
            ("token_embd.weight", true) => "transformer.wte.weight",
            ("position_embd.weight", true) => "transformer.wpe.weight",
            ("output_norm.weight", true) => "transformer.ln_f.weight",
            ("output_norm.bias", true) => "transformer.ln_f.bias",
            _ => return None,
        };
        return same(name.into());
    };
    let (layer, rest) = rest.split_once('.')?;
    let layer: i64 = layer.parse().ok().filter(|layer| (0..config.num_layers).contains(layer))?;
    let (module, kind) = rest.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    if is_gpt2 {
        let (module, is_conv1d) = match module {
            "attn_norm" => ("ln_1", false),
            "attn_qkv" => ("attn.c_attn", true),
            "attn_output" => ("attn.c_proj", true),
            "ffn_norm" => ("ln_2", false),
            "ffn_up" => ("mlp.c_fc", true),
            "ffn_down" => ("mlp.c_proj", true),
            _ => return None,
        };
        let layout = if is_conv1d && kind == "weight" { Layout::Transposed } else { Layout::Same };
        return Some(Placement { name: format!("transformer.h.{layer}.{module}.{kind}"), layout });
    }
    // Files of the `llama` architecture alone were written for rotary pairs that are neighbours.
    let interleaved = |num_heads| match config.architecture {
        Architecture::Llama => Layout::InterleavedHeads { num_heads },
        _ => Layout::Same,
    };
    let (module, layout) = match module {
        "attn_q" => ("self_attn.q_proj", interleaved(config.num_heads)),
        "attn_k" => ("self_attn.k_proj", interleaved(config.num_kv_heads)),
        "attn_v" => ("self_attn.v_proj", Layout::Same),
        "attn_output" => ("self_attn.o_proj", Layout::Same),
        "ffn_gate" => ("mlp.gate_proj", Layout::Same),
        "ffn_up" => ("mlp.up_proj", Layout::Same),
        "ffn_down" => ("mlp.down_proj", Layout::Same),
        "attn_norm" => ("input_layernorm", Layout::Same),
        "ffn_norm" => ("post_attention_layernorm", Layout::Same),
        _ => return None,
    };
    Some(Placement { name: format!("model.layers.{layer}.{module}.{kind}"), layout })
}

/// Undoes [`Layout::InterleavedHeads`] on the stored bytes of `num_rows` rows: row `2i + j` of a head goes to row
/// `j · half + i`. `None` when the rows do not split into heads of even width.
pub(crate) fn deinterleave_heads(bytes: &[u8], num_rows: i64, num_heads: i64) -> Option<Vec<u8>> {
    let (num_rows, num_heads) = (usize::try_from(num_rows).ok()?, usize::try_from(num_heads).ok()?);
    if num_heads == 0
        || num_rows == 0
        || !num_rows.is_multiple_of(2 * num_heads)
        || !bytes.len().is_multiple_of(num_rows)
    {
        return None;
    }
    let row_bytes = bytes.len() / num_rows;
    let half = num_rows / num_heads / 2;
    let mut out = Vec::with_capacity(bytes.len());
    for head in bytes.chunks_exact(2 * half * row_bytes) {
        for j in 0..2 {
            for i in 0..half {
                out.extend_from_slice(&head[(2 * i + j) * row_bytes..][..row_bytes]);
            }
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_return_to_halves() {
        // Two heads of four rows of one byte: llama.cpp wrote rows 0 2 1 3 of each head.
        assert_eq!(deinterleave_heads(&[0, 2, 1, 3, 4, 6, 5, 7], 8, 2).unwrap(), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert!(deinterleave_heads(&[0; 6], 6, 2).is_none());
    }
}
