//! Score: the negative log-likelihood of images under the model.

use tonic::Request;

use super::observe::AnswerBytes;
use super::{WorkerService, convert, status};
use crate::imaging::render;
use crate::model::CallTask;
use crate::model::graph::{Context, Want};
use crate::proto;
use crate::proto::pb;
use crate::serve::error::StageError;
use crate::serve::job::{Answer, RequestedWork};
use crate::serve::rpc::error::RequestError;

/// Answers a Score call.
pub(super) async fn score(
    service: &WorkerService,
    request: Request<pb::ScoreRequest>,
) -> Result<(pb::ScoreResponse, AnswerBytes), RequestError> {
    service.facts()?;
    service.require(CallTask::Score)?;
    let (_, extensions, request) = request.into_parts();
    let preprocess = convert::preprocess(request.preprocess.as_ref())?;
    let work = RequestedWork::Infer {
        // The graph itself shifts the tokens: it needs the last pixel, too.
        context: Context::Raw,
        want: Want::Nll,
    };
    let (outcomes, held) = service
        .outcomes(
            request.images,
            preprocess,
            work,
            service.model.positions(),
            pb::DataType::F32,
            &extensions,
        )
        .await?;
    let options = Options {
        side: service.model.side as usize,
        map: request.map,
        palette: request.complexity.then(|| service.model.palette_rgb8()),
    };
    // Compressing takes a millisecond per image, which must not block the
    // runtime's own threads.
    let results = move || -> Vec<pb::ScoreResult> {
        let result = |outcome| result(outcome, &options);
        outcomes.into_iter().map(result).collect()
    };
    let results = tokio::task::spawn_blocking(results)
        .await
        .map_err(|_| StageError::Lost)?;
    let response = pb::ScoreResponse {
        results,
        model_digest: service.model.digest.clone(),
        preprocess: Some(proto::preprocess_applied(preprocess)),
    };
    Ok((response, held))
}

struct Options {
    side: usize,
    map: bool,
    /// Palette, if the complexity is asked for.
    palette: Option<Vec<u8>>,
}

fn result(outcome: Result<Answer, RequestError>, options: &Options) -> pb::ScoreResult {
    let outcome = match outcome.and_then(|answer| of(answer, options)) {
        Ok(score) => pb::score_result::Outcome::Score(score),
        Err(error) => pb::score_result::Outcome::Error(status::of_image(&error)),
    };
    pb::ScoreResult {
        outcome: Some(outcome),
    }
}

#[expect(clippy::cast_precision_loss, reason = "an image has few tokens")]
fn of(answer: Answer, options: &Options) -> Result<pb::Score, RequestError> {
    let Answer::Nll { tokens, nll } = answer else {
        return Err(StageError::Lost.into());
    };
    let side = options.side;
    let nats: f64 = nll.iter().copied().map(f64::from).sum();
    let nats_per_token = nats / nll.len().max(1) as f64;
    let complexity = match &options.palette {
        Some(palette) => {
            let best = png::Compression::High;
            let file =
                render::png(&tokens, palette, side, 1, best).map_err(|_| StageError::Lost)?;
            Some(file.len() as f64 * 8.0 / nll.len().max(1) as f64)
        }
        None => None,
    };
    Ok(pb::Score {
        nats,
        nats_per_token,
        bits_per_token: nats_per_token / std::f64::consts::LN_2,
        map: options
            .map
            .then(|| convert::tensor(&nll, &[side, side], pb::DataType::F32)),
        complexity_bits_per_token: complexity,
    })
}
