//! Log-probs at label positions without a logits tensor.

use crate::autograd::attach_backward;
use crate::{Result, TensorError};
use tch::{Kind, Tensor, no_grad};

/// Options of [`label_logprobs`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LabelLogprobs {
    /// Logits are divided by it.
    pub temperature: f64,
    /// Gemma's soft cap c: logits become c · tanh(logits / c) before the temperature.
    pub soft_cap: Option<f64>,
    /// Also return the entropy of each distribution.
    pub with_entropy: bool,
    /// Tokens in a tile.
    pub token_tile: i64,
    /// Vocabulary entries in a tile. A tile of logits takes `4 · token_tile · vocab_tile` bytes.
    pub vocab_tile: i64,
}

impl Default for LabelLogprobs {
    fn default() -> Self {
        Self { temperature: 1.0, soft_cap: None, with_entropy: false, token_tile: 512, vocab_tile: 8192 }
    }
}

/// What [`label_logprobs`] returns, each `[num_labels]` f32 (f64 for f64 input).
#[derive(Debug)]
pub struct LabelOutput {
    /// log p(label), nats; differentiable.
    pub logprobs: Tensor,
    /// Entropy in nats; differentiable; `None` unless asked for.
    pub entropy: Option<Tensor>,
    /// 1 where the label is the most probable token, else 0; no gradient.
    pub is_top1: Tensor,
}

/// Log-probs of labels under softmax(f(hidden_states · weightᵀ)), in tiles over tokens and vocabulary.
///
/// The normaliser is an online log-sum-exp in f32, so `[num_labels, vocab_size]` never exists. Where only
/// `hidden_states` needs a gradient (a frozen output weight, the common case of adapters), the forward pass also
/// accumulates E\[weight\] under the distribution, and the backward pass is a multiplication: the vocabulary is
/// passed over once for values and gradients together. Otherwise the tiles are computed again in the backward
/// pass, and both gradients accumulate in f32.
///
/// # Shapes and units
/// - `hidden_states`: `[num_labels, hidden_size]`, the states that predict;
/// - `weight`: `[vocab_size, hidden_size]`, tied or separate;
/// - `label_ids`: `[num_labels]`, i64, in `0..vocab_size`.
///
/// # Errors
/// [`TensorError::Shape`] and [`TensorError::Argument`] for inputs that do not fit, a label out of range included.
pub fn label_logprobs(
    hidden_states: &Tensor,
    weight: &Tensor,
    label_ids: &Tensor,
    options: &LabelLogprobs,
) -> Result<LabelOutput> {
    let (num_labels, hidden_size) = hidden_states
        .size2()
        .map_err(|_| TensorError::shape("hidden_states", hidden_states, "[num_labels, hidden_size]"))?;
    let vocab_size = match weight.size()[..] {
        [vocab_size, width] if width == hidden_size => vocab_size,
        _ => return Err(TensorError::shape("weight", weight, format!("[vocab_size, {hidden_size}]"))),
    };
    if label_ids.size() != [num_labels] || label_ids.kind() != Kind::Int64 {
        return Err(TensorError::shape("label_ids", label_ids, format!("[{num_labels}] of i64")));
    }
    if !(options.temperature > 0.0 && options.temperature.is_finite()) {
        return Err(TensorError::argument("temperature", options.temperature, "a positive number"));
    }
    if options.soft_cap.is_some_and(|cap| cap.is_nan() || cap <= 0.0) {
        return Err(TensorError::argument("soft_cap", format!("{:?}", options.soft_cap), "a positive number"));
    }
    if options.token_tile < 1 || options.vocab_tile < 1 {
        return Err(TensorError::argument(
            "tile",
            format!("{} x {}", options.token_tile, options.vocab_tile),
            "at least 1 x 1",
        ));
    }
    if num_labels > 0 {
        let (low, high) = (label_ids.min().int64_value(&[]), label_ids.max().int64_value(&[]));
        if low < 0 || high >= vocab_size {
            return Err(TensorError::argument(
                "label_ids",
                format!("{low}..={high}"),
                &format!("ids in 0..{vocab_size}"),
            ));
        }
    }
    let wants_hidden = hidden_states.requires_grad();
    let wants_weight = weight.requires_grad();
    // The shortcut: d log p / d hidden needs nothing from upstream but one factor per row.
    let is_one_pass = wants_hidden && !wants_weight && !options.with_entropy;
    let tiles = Tiles {
        hidden: hidden_states.detach(),
        weight: weight.detach(),
        labels: label_ids.shallow_clone(),
        options: *options,
    };
    let pass = no_grad(|| tiles.forward(is_one_pass))?;

    let accumulate_kind = accumulate_kind(hidden_states);
    let logprobs = &pass.label_logits - &pass.log_sum_exp;
    let is_top1 = pass.label_logits.ge_tensor(&pass.max).to_kind(accumulate_kind);
    let entropy = options.with_entropy.then(|| &pass.log_sum_exp - &pass.expected_logit);
    if let Some(direction) = pass.direction {
        attach_backward("label_logprobs", &[hidden_states], &[&logprobs], move |grads| {
            Ok(vec![
                grads[0].as_ref().map(|g| (direction.to_kind(g.kind()) * g.unsqueeze(1)).to_kind(direction.kind())),
            ])
        })?;
    } else if wants_hidden || wants_weight {
        let log_sum_exp = pass.log_sum_exp.shallow_clone();
        let saved_entropy = entropy.as_ref().map(Tensor::copy);
        let outputs: Vec<&Tensor> = std::iter::once(&logprobs).chain(&entropy).collect();
        attach_backward("label_logprobs", &[hidden_states, weight], &outputs, move |grads| {
            let grad_entropy = grads.get(1).and_then(Option::as_ref);
            tiles.backward(
                &log_sum_exp,
                grads[0].as_ref(),
                grad_entropy.zip(saved_entropy.as_ref()),
                wants_hidden,
                wants_weight,
            )
        })?;
    }
    Ok(LabelOutput { logprobs, entropy, is_top1 })
}

/// f32, or f64 for f64 input (finite differences in tests).
fn accumulate_kind(tensor: &Tensor) -> Kind {
    if tensor.kind() == Kind::Double { Kind::Double } else { Kind::Float }
}

struct Tiles {
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: LabelLogprobs,
}

/// Per label, in the accumulation kind: `[num_labels]`, but for `direction`.
struct Forward {
    label_logits: Tensor,
    log_sum_exp: Tensor,
    max: Tensor,
    /// Σ p · logit, for the entropy.
    expected_logit: Tensor,
    /// d log p / d hidden, `[num_labels, hidden_size]`, in the kind of `hidden`.
    direction: Option<Tensor>,
}

impl Tiles {
    /// Final logits of a tile, and d final / d raw where the soft cap makes it differ from a constant.
    fn logits(&self, hidden: &Tensor, weight: &Tensor, with_slope: bool) -> Result<(Tensor, Option<Tensor>)> {
        let raw = hidden.f_linear(weight, None::<Tensor>)?.to_kind(accumulate_kind(hidden));
        let mut slope = None;
        let mut logits = match self.options.soft_cap {
            None => raw,
            Some(cap) => {
                let tanh = (raw / cap).tanh();
                slope = with_slope.then(|| 1.0 - tanh.square());
                tanh * cap
            }
        };
        if self.options.temperature != 1.0 {
            let _ = logits.g_mul_scalar_(1.0 / self.options.temperature);
        }
        Ok((logits, slope))
    }

    fn token_tiles(&self) -> impl Iterator<Item = (i64, i64)> + use<> {
        tiles(self.hidden.size()[0], self.options.token_tile)
    }

    fn vocab_tiles(&self) -> impl Iterator<Item = (i64, i64)> + use<> {
        tiles(self.weight.size()[0], self.options.vocab_tile)
    }

    fn forward(&self, with_direction: bool) -> Result<Forward> {
        let kind = accumulate_kind(&self.hidden);
        let device = self.hidden.device();
        let num_labels = self.hidden.size()[0];
        let column = |value: f64| Tensor::full([num_labels], value, (kind, device));
        let label_logits = column(0.0);
        let (log_sum_exp, all_max, expected_logit) = (column(0.0), column(0.0), column(0.0));
        let direction = with_direction.then(|| self.hidden.empty_like());
        for (start, len) in self.token_tiles() {
            let hidden = self.hidden.narrow(0, start, len);
            let labels = self.labels.narrow(0, start, len);
            // The label's own logit comes out of the tiles too, so that it carries the same rounding as the sum.
            let label_logit = Tensor::zeros([len], (kind, device));
            let label_slope = Tensor::ones([len, 1], (kind, device));
            let mut max = Tensor::full([len], f64::NEG_INFINITY, (kind, device));
            let mut sum = Tensor::zeros([len], (kind, device));
            let mut weighted = Tensor::zeros([len], (kind, device));
            let mut expected_weight =
                direction.as_ref().map(|_| Tensor::zeros([len, self.hidden.size()[1]], (kind, device)));
            for (first, count) in self.vocab_tiles() {
                let weight = self.weight.narrow(0, first, count);
                let (mut logits, slope) = self.logits(&hidden, &weight, with_direction)?;
                // Labels outside the tile read a clamped entry and are masked out.
                let local = (&labels - first).clamp(0, count - 1).unsqueeze(1);
                let is_here = labels.ge(first).logical_and(&labels.lt(first + count));
                let _ = label_logit
                    .shallow_clone()
                    .g_add_(&logits.gather(1, &local, false).squeeze_dim(1).where_scalarother(&is_here, 0.0));
                let new_max = max.maximum(&logits.amax([1], false));
                let rescale = (&max - &new_max).exp();
                if self.options.with_entropy {
                    let p = (&logits - new_max.unsqueeze(1)).exp();
                    weighted = weighted * &rescale + (&p * &logits).sum_dim_intlist(1, false, kind);
                    sum = sum * &rescale + p.sum_dim_intlist(1, false, kind);
                } else {
                    let p = logits.g_sub_(&new_max.unsqueeze(1)).exp_();
                    sum = sum * &rescale + p.sum_dim_intlist(1, false, kind);
                    if let Some(expected_weight) = &mut expected_weight {
                        let mut p = p;
                        if let Some(slope) = &slope {
                            let here = slope.gather(1, &local, false).where_self(&is_here.unsqueeze(1), &label_slope);
                            label_slope.shallow_clone().copy_(&here);
                            p *= slope;
                        }
                        let contribution = p.to_kind(weight.kind()).matmul(&weight);
                        let _ = expected_weight.g_mul_(&rescale.unsqueeze(1));
                        let _ = expected_weight.g_add_(&contribution.to_kind(kind));
                    }
                }
                max = new_max;
            }
            log_sum_exp.narrow(0, start, len).copy_(&(&max + sum.log()));
            all_max.narrow(0, start, len).copy_(&max);
            label_logits.narrow(0, start, len).copy_(&label_logit);
            if self.options.with_entropy {
                expected_logit.narrow(0, start, len).copy_(&(weighted / &sum));
            }
            if let (Some(direction), Some(expected_weight)) = (&direction, expected_weight) {
                let own = self.weight.index_select(0, &labels).to_kind(kind) * &label_slope;
                let value = (own - expected_weight / sum.unsqueeze(1)) / self.options.temperature;
                direction.narrow(0, start, len).copy_(&value);
            }
        }
        Ok(Forward { label_logits, log_sum_exp, max: all_max, expected_logit, direction })
    }

    /// d logprob / d logit = onehot − p; d entropy / d logit = −p · (log p + entropy).
    fn backward(
        &self,
        log_sum_exp: &Tensor,
        grad_logprobs: Option<&Tensor>,
        entropy: Option<(&Tensor, &Tensor)>,
        wants_hidden: bool,
        wants_weight: bool,
    ) -> Result<Vec<Option<Tensor>>> {
        let kind = accumulate_kind(&self.hidden);
        let device = self.hidden.device();
        let mut grad_hidden = wants_hidden.then(|| Tensor::zeros(self.hidden.size(), (kind, device)));
        let mut grad_weight = wants_weight.then(|| Tensor::zeros(self.weight.size(), (kind, device)));
        for (start, len) in self.token_tiles() {
            let hidden = self.hidden.narrow(0, start, len);
            let labels = self.labels.narrow(0, start, len);
            let log_sum_exp = log_sum_exp.narrow(0, start, len).unsqueeze(1);
            for (first, count) in self.vocab_tiles() {
                let weight = self.weight.narrow(0, first, count);
                let (logits, slope) = self.logits(&hidden, &weight, true)?;
                let log_p = logits - &log_sum_exp;
                let p = log_p.exp();
                let mut grad = p.zeros_like();
                if let Some(upstream) = grad_logprobs {
                    let upstream = upstream.narrow(0, start, len).unsqueeze(1);
                    let is_here = labels.ge(first).logical_and(&labels.lt(first + count)).unsqueeze(1).to_kind(kind);
                    let local = (&labels - first).clamp(0, count - 1).unsqueeze(1);
                    grad = (&p * -&upstream).scatter_add(1, &local, &(is_here * upstream));
                }
                if let Some((upstream, entropy)) = entropy {
                    let (upstream, entropy) = (upstream.narrow(0, start, len), entropy.narrow(0, start, len));
                    grad -= p * (log_p + entropy.unsqueeze(1)) * upstream.unsqueeze(1);
                }
                if let Some(slope) = slope {
                    grad *= slope;
                }
                let grad = (grad / self.options.temperature).to_kind(self.hidden.kind());
                if let Some(total) = &mut grad_hidden {
                    let _ = total.narrow(0, start, len).g_add_(&grad.matmul(&weight).to_kind(kind));
                }
                if let Some(total) = &mut grad_weight {
                    let _ = total.narrow(0, first, count).g_add_(&grad.tr().matmul(&hidden).to_kind(kind));
                }
            }
        }
        Ok(vec![grad_hidden.map(|g| g.to_kind(self.hidden.kind())), grad_weight.map(|g| g.to_kind(self.weight.kind()))])
    }
}

/// `(start, len)` of consecutive tiles that cover `0..total`.
fn tiles(total: i64, tile: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..total).step_by(tile as usize).map(move |start| (start, tile.min(total - start)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    struct Case {
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
    }

    fn case(kind: Kind) -> Case {
        let _lock = crate::random::test_lock();
        Case {
            hidden: Tensor::randn([9, 6], (Kind::Double, Device::Cpu)).to_kind(kind),
            weight: Tensor::randn([23, 6], (Kind::Double, Device::Cpu)).to_kind(kind),
            labels: Tensor::randint(23, [9], (Kind::Int64, Device::Cpu)),
        }
    }

    /// The definition, with a whole logits tensor and libtorch's autograd.
    fn naive(case: &Case, options: &LabelLogprobs) -> (Tensor, Tensor) {
        let mut logits = case.hidden.matmul(&case.weight.tr());
        if let Some(cap) = options.soft_cap {
            logits = (logits / cap).tanh() * cap;
        }
        let log_p = (logits / options.temperature).log_softmax(-1, Kind::Double);
        let entropy = -(log_p.exp() * &log_p).sum_dim_intlist(-1, false, Kind::Double);
        (log_p.gather(1, &case.labels.unsqueeze(1), false).squeeze_dim(1), entropy)
    }

    fn max_error(a: &Tensor, b: &Tensor) -> f64 {
        (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
    }

    #[test]
    fn values_and_gradients_equal_the_definition_at_every_tile_size() {
        for (temperature, soft_cap) in [(1.0, None), (0.7, None), (1.3, Some(2.0))] {
            for (token_tile, vocab_tile) in [(1, 1), (2, 5), (4, 23), (9, 8), (100, 100)] {
                for (with_entropy, wants_weight) in [(false, false), (false, true), (true, false), (true, true)] {
                    let options = LabelLogprobs { temperature, soft_cap, with_entropy, token_tile, vocab_tile };
                    let mut case = case(Kind::Double);
                    case.hidden = case.hidden.set_requires_grad(true);
                    case.weight = case.weight.set_requires_grad(wants_weight);
                    let out = label_logprobs(&case.hidden, &case.weight, &case.labels, &options).unwrap();
                    let (logprobs, entropy) = naive(&case, &options);
                    assert!(max_error(&out.logprobs, &logprobs) < 1e-12);
                    let upstream = Tensor::arange(9, (Kind::Double, Device::Cpu)) - 4.0;
                    let total = |l: &Tensor, h: Option<&Tensor>| {
                        let mut sum = (l * &upstream).sum(Kind::Double);
                        if let Some(h) = h.filter(|_| with_entropy) {
                            sum += (h * &upstream * 0.3).sum(Kind::Double);
                        }
                        sum
                    };
                    total(&out.logprobs, out.entropy.as_ref()).backward();
                    let grads = (case.hidden.grad().copy(), wants_weight.then(|| case.weight.grad().copy()));
                    case.hidden.zero_grad();
                    case.weight.zero_grad();
                    total(&logprobs, Some(&entropy)).backward();
                    assert!(max_error(&grads.0, &case.hidden.grad()) < 1e-10, "{options:?}");
                    if let Some(grad) = grads.1 {
                        assert!(max_error(&grad, &case.weight.grad()) < 1e-10, "{options:?}");
                    }
                    if let Some(own) = out.entropy {
                        assert!(max_error(&own, &entropy) < 1e-12);
                    }
                }
            }
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let case = case(Kind::Double);
        let hidden = case.hidden.copy().set_requires_grad(true);
        let options = LabelLogprobs { soft_cap: Some(3.0), temperature: 0.8, vocab_tile: 7, ..Default::default() };
        label_logprobs(&hidden, &case.weight, &case.labels, &options).unwrap().logprobs.sum(Kind::Double).backward();
        let value = |h: &Tensor| {
            label_logprobs(h, &case.weight, &case.labels, &options)
                .unwrap()
                .logprobs
                .sum(Kind::Double)
                .double_value(&[])
        };
        for (row, column) in [(0, 0), (3, 5), (8, 2)] {
            let step = Tensor::zeros([9, 6], (Kind::Double, Device::Cpu));
            let _ = step.get(row).get(column).fill_(1e-5);
            let difference = (value(&(&case.hidden + &step)) - value(&(&case.hidden - &step))) / 2e-5;
            assert!((difference - hidden.grad().double_value(&[row, column])).abs() < 1e-8);
        }
    }

    #[test]
    fn bf16_stays_close_to_f64() {
        let mut case = case(Kind::BFloat16);
        let out = label_logprobs(&case.hidden, &case.weight, &case.labels, &LabelLogprobs::default()).unwrap();
        assert_eq!(out.logprobs.kind(), Kind::Float);
        case.hidden = case.hidden.to_kind(Kind::Double);
        case.weight = case.weight.to_kind(Kind::Double);
        assert!(max_error(&out.logprobs, &naive(&case, &LabelLogprobs::default()).0) < 0.05);
    }

    #[test]
    fn top1_marks_the_most_probable_label() {
        let hidden = Tensor::from_slice(&[1f32, 0.]).view([1, 2]).repeat([2, 1]);
        let weight = Tensor::from_slice(&[0f32, 0., 5., 0., 1., 0.]).view([3, 2]);
        let labels = Tensor::from_slice(&[1i64, 2]);
        let out =
            label_logprobs(&hidden, &weight, &labels, &LabelLogprobs { vocab_tile: 2, ..Default::default() }).unwrap();
        assert_eq!(Vec::<f32>::try_from(&out.is_top1).unwrap(), [1., 0.]);
    }

    #[test]
    fn no_labels_give_an_empty_result() {
        let hidden = Tensor::zeros([0, 2], (Kind::Float, Device::Cpu));
        let weight = Tensor::zeros([3, 2], (Kind::Float, Device::Cpu));
        let labels = Tensor::zeros([0], (Kind::Int64, Device::Cpu));
        assert_eq!(label_logprobs(&hidden, &weight, &labels, &Default::default()).unwrap().logprobs.size(), [0]);
    }

    #[test]
    fn inputs_that_do_not_fit_are_refused() {
        let case = case(Kind::Float);
        let run =
            |labels: &Tensor, options: LabelLogprobs| label_logprobs(&case.hidden, &case.weight, labels, &options);
        let too_high = Tensor::full([9], 23, (Kind::Int64, Device::Cpu));
        assert!(run(&too_high, Default::default()).unwrap_err().to_string().contains("0..23"));
        assert!(run(&case.labels, LabelLogprobs { temperature: 0.0, ..Default::default() }).is_err());
        assert!(run(&case.labels.narrow(0, 0, 3), Default::default()).is_err());
    }
}
