//! Extracts the numbers that each caller wants from a run's output.

use ndarray::{ArrayView2, ArrayViewD, Axis, Ix2, Ix3, s};

use crate::engine::GraphRun;
use crate::model::graph::{Graph, Layers, Want};
use crate::runtime::error::EngineError;

/// Extracts the wanted numbers of each row from a run's output. Pooling happens
/// here, on the runtime's memory, so that only a vector is copied, not all
/// states of a row (2 MiB for imagegpt-small).
pub(super) fn answers(
    run: &GraphRun<'_>,
    positions: usize,
    output: &ArrayViewD<'_, f32>,
) -> Result<Vec<Vec<f32>>, EngineError> {
    let &GraphRun {
        graph,
        bucket,
        rows,
    } = run;
    let refused = || EngineError::Output {
        got: format!("shape {:?}", output.shape()),
        expected: match graph {
            Graph::Features(_) => format!("[{bucket}, layers, width]"),
            Graph::Hidden => format!("[{bucket}, {positions}, width]"),
            Graph::Logits => format!("[{bucket}, classes]"),
            Graph::Score | Graph::Generate => format!("[{bucket}, {positions}]"),
        },
    };
    // If the answer of a row is one vector, it becomes a matrix with a single
    // row.
    let view = output.view();
    let vectors = match graph {
        Graph::Hidden | Graph::Features(_) => view.into_dimensionality::<Ix3>(),
        Graph::Logits | Graph::Score | Graph::Generate => view
            .into_dimensionality::<Ix2>()
            .map(|vectors| vectors.insert_axis(Axis(1))),
    };
    let fits = |&(n_rows, n_vectors, width): &(usize, usize, usize)| {
        let fits = match graph {
            Graph::Hidden => n_vectors == positions,
            Graph::Features(_) => n_vectors > 0,
            Graph::Logits => true,
            Graph::Score => width == positions,
            Graph::Generate => false,
        };
        n_rows == bucket && width > 0 && fits
    };
    let vectors = vectors.ok().filter(|vectors| fits(&vectors.dim()));
    let vectors = vectors.ok_or_else(refused)?;
    rows.iter()
        .zip(vectors.outer_iter())
        .map(|(row, vectors)| match row.want {
            Want::Features { layers, .. } => pick(&vectors, layers),
            Want::States | Want::Logits | Want::Nll => Ok(flat(&vectors)),
            Want::Last => Ok(flat(&vectors.slice(s![-1.., ..]))),
            Want::Mean => Ok(mean(&vectors)),
        })
        .collect()
}

fn flat(vectors: &ArrayView2<'_, f32>) -> Vec<f32> {
    vectors.to_owned().into_raw_vec_and_offset().0
}

/// Selects the features of some layers from those of all layers.
fn pick(features: &ArrayView2<'_, f32>, layers: Layers) -> Result<Vec<f32>, EngineError> {
    let layers: Vec<usize> = layers.iter().collect();
    let n_layers = features.nrows();
    match layers.iter().find(|&&layer| layer >= n_layers) {
        None => Ok(flat(&features.select(Axis(0), &layers).view())),
        Some(layer) => Err(EngineError::Output {
            got: format!("{n_layers} layers"),
            expected: format!("layer {layer}"),
        }),
    }
}

/// Computes the mean over positions, with sums in f64 so that the order of
/// summation does not show in f32.
fn mean(states: &ArrayView2<'_, f32>) -> Vec<f32> {
    let sums = states.fold_axis(Axis(0), 0.0_f64, |sum, &value| sum + f64::from(value));
    #[expect(clippy::cast_precision_loss, reason = "positions are at most 2^16")]
    let n_states = states.nrows() as f64;
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the answer is f32, rounded once"
    )]
    sums.iter().map(|sum| (sum / n_states) as f32).collect()
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, Array3, array};

    use super::*;
    use crate::engine::BatchRow;

    #[test]
    fn a_mean_is_over_positions() {
        let states = array![[1.0, 10.0], [3.0, 30.0]];
        assert_eq!(mean(&states.view()), [2.0, 20.0]);
    }

    #[test]
    fn a_mean_adds_in_the_order_of_positions() {
        for width in [1, 3] {
            // With values of such different sizes, another order gives other
            // bits.
            let states = Array2::from_shape_fn((100, width), |(position, column)| {
                let exponent = (position * 37 + column) % 53;
                2.0_f32.powi(i32::try_from(exponent).unwrap()) / 3.0
            });
            let expected = states.columns().into_iter().map(|column| {
                let sum = column
                    .iter()
                    .fold(0.0, |sum, &value| sum + f64::from(value));
                #[expect(clippy::cast_possible_truncation, reason = "as the mean is")]
                {
                    (sum / 100.0) as f32
                }
            });
            let expected: Vec<f32> = expected.collect();
            assert_eq!(mean(&states.view()), expected);
        }
    }

    #[test]
    fn layers_are_picked_out_of_all() {
        let features = array![[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]];
        let of = |list: &[u32]| pick(&features.view(), Layers::ascending(list).unwrap());
        assert_eq!(of(&[0, 2]).unwrap(), [1.0, 2.0, 5.0, 6.0]);
        let error = of(&[1, 3]).unwrap_err().to_string();
        assert_eq!(error, "the model returned 3 layers, not layer 3");
    }

    #[test]
    fn answers_are_cut_by_what_each_row_wants() {
        let rows = [Want::Mean, Want::Last, Want::States].map(|want| BatchRow {
            tokens: &[0, 1],
            want,
        });
        let values: Vec<f32> = (0..16_u8).map(f32::from).collect();
        let output = Array3::from_shape_vec((4, 2, 2), values).unwrap();
        // The fourth row is padding.
        let run = GraphRun {
            graph: Graph::Hidden,
            bucket: 4,
            rows: &rows,
        };
        let got = answers(&run, 2, &output.view().into_dyn()).expect("fits");
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
        let output = Array3::zeros((1, 3, 2));
        let error =
            answers(&run, 2, &output.view().into_dyn()).expect_err("three positions are not two");
        assert_eq!(
            error.to_string(),
            "the model returned shape [1, 3, 2], not [1, 2, width]"
        );
    }
}
