"""The mutating webhook: an AdmissionReview in, its answer out, no socket needed; and the application that serves it.

Invariant: a pure function of the body. It reads no state of Tessera's and changes none, so whoever reaches the port can
learn nothing and break nothing.
"""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter

from scheduler.intake.admission import UNTOUCHED, BadReview, admit, answer, read_review

from .patience import body_of, patience
from .problems import problem, problems, refuse_encodings

BODY_MAX = 512 * 1024
BUDGET_S = 2.0
"""Seconds for a body to come: kube-apiserver does not wait longer for an answer either."""

OUTCOMES = ("held", "untouched", "refused", "malformed")


class Webhook:
    """Answers kube-apiserver and counts its answers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Register the counter."""
        counter = Counter("tessera_admission_reviews", "Answers to kube-apiserver.", ["outcome"], registry=registry)
        self._counts = {outcome: counter.labels(outcome) for outcome in OUTCOMES}

    def mutate(self, body: bytes) -> bytes:
        """Return the AdmissionReview that answers the one in `body`, which has at most `BODY_MAX` bytes.

        Raises:
            BadReview: the body is none.
        """
        try:
            review = read_review(body)
        except BadReview:
            self._counts["malformed"].inc()
            raise
        admission = UNTOUCHED if review.pod is None else admit(review.pod)
        outcome = "refused" if admission.refusal else "untouched" if admission is UNTOUCHED else "held"
        self._counts[outcome].inc()
        return answer(review.uid, admission)


def webhook_app(webhook: Webhook) -> web.Application:
    """Serve kube-apiserver, over TLS."""
    app = web.Application(client_max_size=BODY_MAX, middlewares=[patience, problems, refuse_encodings])

    async def mutate(http: web.Request) -> web.Response:
        try:
            reply = webhook.mutate(await body_of(http, within_s=BUDGET_S))
        except BadReview as error:
            return problem(400, error.code, str(error))
        return web.Response(body=reply, content_type="application/json")

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    app.router.add_post("/mutate", mutate)
    app.router.add_get("/healthz", healthz)
    return app
