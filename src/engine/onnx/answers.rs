//! From a run's output to what each caller wanted of it.

use ort::value::Shape;

use crate::engine::GraphRun;
use crate::model::graph::Graph;
use crate::model::graph::{Layers, Want};
use crate::runtime::error::EngineError;

/// Cuts a run's output into the wanted numbers of each row. Pooling happens
/// here, next to the runtime's memory, so that of a row's states (2 MiB for
/// imagegpt-small) only the vector is copied out.
pub(super) fn answers(
    run: &GraphRun<'_>,
    positions: usize,
    shape: &Shape,
    values: &[f32],
) -> Result<Vec<Vec<f32>>, EngineError> {
    let dims: Vec<usize> = shape
        .iter()
        .map(|&dim| usize::try_from(dim).unwrap_or(0))
        .collect();
    let &GraphRun {
        graph,
        bucket,
        rows,
    } = run;
    let row_len = match (graph, dims.as_slice()) {
        (Graph::Hidden, &[n_rows, n_positions, width])
            if n_rows == bucket && n_positions == positions && width > 0 =>
        {
            n_positions * width
        }
        (Graph::Features(_), &[n_rows, n_layers, width])
            if n_rows == bucket && n_layers > 0 && width > 0 =>
        {
            n_layers * width
        }
        (Graph::Logits, &[n_rows, n_classes]) if n_rows == bucket && n_classes > 0 => n_classes,
        (Graph::Score, &[n_rows, n_positions]) if n_rows == bucket && n_positions == positions => {
            n_positions
        }
        _ => {
            return Err(EngineError::Output {
                got: format!("shape {dims:?}"),
                expected: match graph {
                    Graph::Features(_) => format!("[{bucket}, layers, width]"),
                    Graph::Hidden => format!("[{bucket}, {positions}, width]"),
                    Graph::Logits => format!("[{bucket}, classes]"),
                    Graph::Score | Graph::Generate => format!("[{bucket}, {positions}]"),
                },
            });
        }
    };
    let width = dims.last().copied().unwrap_or(0);
    rows.iter()
        .zip(values.chunks_exact(row_len))
        .map(|(row, values)| match row.want {
            Want::Features { layers, .. } => pick(values, width, layers),
            Want::States | Want::Logits | Want::Nll => Ok(values.to_vec()),
            Want::Last => Ok(values[row_len - width..].to_vec()),
            Want::Mean => Ok(mean(values, width)),
        })
        .collect()
}

/// The features of some layers out of those of all.
fn pick(values: &[f32], width: usize, layers: Layers) -> Result<Vec<f32>, EngineError> {
    let mut picked = Vec::with_capacity(layers.len() * width);
    for layer in layers.iter() {
        let features = values.get(layer * width..(layer + 1) * width);
        picked.extend_from_slice(features.ok_or_else(|| EngineError::Output {
            got: format!("{} layers", values.len() / width),
            expected: format!("layer {layer}"),
        })?);
    }
    Ok(picked)
}

/// Mean over positions, summed in f64 so that the order of summation does not
/// show in f32.
fn mean(states: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0_f64; width];
    let states = states.chunks_exact(width);
    #[expect(clippy::cast_precision_loss, reason = "positions are at most 2^16")]
    let n_states = states.len() as f64;
    for state in states {
        for (sum, &value) in sums.iter_mut().zip(state) {
            *sum += f64::from(value);
        }
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the answer is f32, rounded once"
    )]
    sums.iter().map(|sum| (sum / n_states) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::BatchRow;

    #[test]
    fn a_mean_is_over_positions() {
        assert_eq!(mean(&[1.0, 10.0, 3.0, 30.0], 2), [2.0, 20.0]);
    }

    #[test]
    fn answers_are_cut_by_what_each_row_wants() {
        let rows = [Want::Mean, Want::Last, Want::States].map(|want| BatchRow {
            tokens: &[0, 1],
            want,
        });
        let values: Vec<f32> = (0..16_u8).map(f32::from).collect();
        // The fourth row is padding.
        let run = GraphRun {
            graph: Graph::Hidden,
            bucket: 4,
            rows: &rows,
        };
        let got = answers(&run, 2, &Shape::new([4, 2, 2]), &values).expect("fits");
        assert_eq!(
            got,
            [vec![1.0, 2.0], vec![6.0, 7.0], vec![8.0, 9.0, 10.0, 11.0]]
        );
    }

    #[test]
    fn another_shape_is_refused() {
        let rows = [BatchRow {
            tokens: &[0, 1],
            want: Want::Mean,
        }];
        let run = GraphRun {
            graph: Graph::Hidden,
            bucket: 1,
            rows: &rows,
        };
        let error = answers(&run, 2, &Shape::new([1, 3, 2]), &[0.0; 6])
            .expect_err("three positions are not two");
        assert_eq!(
            error.to_string(),
            "the model returned shape [1, 3, 2], not [1, 2, width]"
        );
    }
}
