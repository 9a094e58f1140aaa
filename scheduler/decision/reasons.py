"""Why something does not run, in closed words: who must act, and one sentence in English and Korean.

The word is the stable name, the sentence explains it. Invariant: no sentence holds a number, a node's name or a time,
since kube-scheduler tries a pod again whenever its text changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Class: TypeAlias = Literal["wait", "change", "admin"]


@dataclass(frozen=True, slots=True)
class Reason:
    """One word of the vocabulary.

    Attributes:
        code: CamelCase word.
        who: `wait` = nobody need act, `change` = the user, `admin` = an administrator.
        text, text_ko: one sentence each.
    """

    code: str
    who: Class
    text: str
    text_ko: str


REASONS: dict[str, Reason] = {
    reason.code: reason
    for reason in (
        # of a request
        Reason(
            "WaitingForCapacity",
            "wait",
            "Waiting for capacity: what the pod asks is in use now.",
            "자원이 비기를 기다리는 중입니다. 요청한 자원이 현재 모두 사용 중입니다.",
        ),
        Reason(
            "WaitingForQuota",
            "wait",
            "Waiting for quota: what the queue may use now is in use.",
            "할당량이 비기를 기다리는 중입니다. 큐가 현재 쓸 수 있는 만큼 모두 사용 중입니다.",
        ),
        Reason(
            "PendingEvaluation",
            "wait",
            "Not judged yet: a decision follows soon.",
            "아직 판단 전입니다. 곧 결정됩니다.",
        ),
        Reason(
            "BackingOff",
            "wait",
            "An earlier attempt did not come through; the next one starts soon.",
            "이전 시도가 완료되지 않았습니다. 곧 다시 시도합니다.",
        ),
        Reason(
            "AllocatorUnavailable",
            "wait",
            "Accepted and kept; the allocator answers again after its recovery.",
            "요청은 접수되어 보관 중입니다. 할당기가 복구되면 처리됩니다.",
        ),
        Reason(
            "TooManyHeld",
            "wait",
            "Too many requests are held, of the namespace or in all: the pod is taken in after the recovery.",
            "네임스페이스 또는 전체의 보관 요청이 한도에 이르렀습니다. 복구된 뒤에 파드를 접수합니다.",
        ),
        Reason(
            "HeldTooLong",
            "change",
            "It was held for a day without a recovery and has expired: delete the pod and create it again.",
            "하루 동안 복구되지 않아 보관이 만료되었습니다. 파드를 삭제하고 다시 만드십시오.",
        ),
        Reason(
            "ExceedsNodeSize",
            "change",
            "No node of the allowed kind is large enough: ask for less per pod.",
            "허용된 노드 중 이만큼 큰 노드가 없습니다. 파드당 요청량을 줄이십시오.",
        ),
        Reason(
            "ExceedsClusterSize",
            "change",
            "Matching nodes could not hold all pods of the gang at the same time, even empty: ask for less per pod.",
            "조건에 맞는 노드가 모두 비어 있어도 갱의 파드를 동시에 담을 수 없습니다. 파드당 요청량을 줄이십시오.",
        ),
        Reason(
            "NoSuchGpuModel",
            "change",
            "No node has a GPU of an allowed model: change the annotation gpu-model.",
            "허용된 모델의 GPU를 가진 노드가 없습니다. gpu-model 주석을 바꾸십시오.",
        ),
        Reason(
            "NoSuchMigProfile",
            "change",
            "No GPU there has this MIG profile: ask for another one or for whole GPUs.",
            "해당 GPU에는 이 MIG 프로파일이 없습니다. 다른 프로파일이나 전체 GPU를 요청하십시오.",
        ),
        Reason(
            "ExceedsGpuMemory",
            "change",
            "The shares asked are larger than the GPUs: ask for smaller or fewer ones.",
            "요청한 공유분이 GPU보다 큽니다. 더 작거나 더 적은 공유분을 요청하십시오.",
        ),
        Reason(
            "NoMatchingNode",
            "change",
            "No node matches the pod's selector, affinity and tolerations.",
            "파드의 선택자, 어피니티, 톨러레이션에 맞는 노드가 없습니다.",
        ),
        Reason(
            "InvalidRequest",
            "change",
            "The pod cannot be placed as it is written, for example because only an init container asks for a GPU.",
            "파드를 작성된 그대로는 배치할 수 없습니다. 예: 초기화 컨테이너만 GPU를 요청함.",
        ),
        Reason(
            "ExceedsQuotaLimit",
            "change",
            "The queue may never use this much, even with nothing in use: ask for less or use another queue.",
            "사용 중인 자원이 전혀 없어도 큐의 한도를 넘습니다. 요청량을 줄이거나 다른 큐를 사용하십시오.",
        ),
        Reason(
            "WaitingBehindPriority",
            "wait",
            "Waiting behind earlier requests of the same queue, which wait for these nodes or this quota themselves.",
            "같은 큐의 앞선 요청을 기다리는 중입니다. 앞선 요청도 이 노드나 이 할당량을 기다리고 있습니다.",
        ),
        Reason(
            "WaitingForGang",
            "wait",
            "Waiting for the other pods of its gang, which start together or not at all.",
            "같은 갱의 다른 파드를 기다리는 중입니다. 갱의 파드는 모두 함께 시작합니다.",
        ),
        Reason(
            "WaitingForAutoscale",
            "wait",
            "Waiting for a new node: none has room, and a node of a configured group would.",
            "새 노드를 기다리는 중입니다. 자리가 있는 노드가 없지만, 설정된 그룹의 새 노드에는 들어갈 수 있습니다.",
        ),
        Reason(
            "WaitingForGate",
            "wait",
            "Another scheduling gate than Tessera's holds the pod: whoever set it must remove it.",
            "Tessera 외의 스케줄링 게이트가 파드를 붙잡고 있습니다. 설정한 쪽에서 제거해야 합니다.",
        ),
        Reason(
            "SchedulerNotRunning",
            "admin",
            "kube-scheduler of profile tessera is not heard of, so nothing is let go: an administrator must look.",
            "tessera 프로파일의 kube-scheduler가 응답하지 않아 파드를 내보내지 않습니다. 관리자의 점검이 필요합니다.",
        ),
        Reason(
            "QueueNotFound",
            "admin",
            "There is no queue of this name: create it, or correct the label queue.",
            "이 이름의 큐가 없습니다. 큐를 만들거나 queue 레이블을 고치십시오.",
        ),
        Reason(
            "NotAuthorized",
            "admin",
            "The pod's namespace may not use this queue: the queue's namespaceSelector does not select it.",
            "파드의 네임스페이스는 이 큐를 사용할 수 없습니다. 큐의 namespaceSelector가 선택하지 않습니다.",
        ),
        Reason(
            "QueueStopped",
            "admin",
            "The queue, or one above it, admits nothing: it is stopped, or its object must be corrected.",
            "큐 또는 상위 큐가 요청을 받지 않습니다. 중지되었거나 큐 오브젝트를 고쳐야 합니다.",
        ),
        Reason(
            "AllGpusUnhealthy",
            "admin",
            "Too few healthy GPUs on the nodes that match: an administrator must look at them.",
            "조건에 맞는 노드에 정상 GPU가 부족합니다. 관리자의 점검이 필요합니다.",
        ),
        Reason(
            "InventoryStale",
            "admin",
            "It is not known for certain what the node has or who holds it.",
            "노드의 장치 현황이나 사용 주체를 확실히 알 수 없습니다.",
        ),
        Reason(
            "AttemptsSpent",
            "admin",
            "Every allowed attempt failed after its reservation: an administrator must look at the cause.",
            "허용된 시도가 예약 이후 모두 실패했습니다. 관리자의 원인 확인이 필요합니다.",
        ),
        # of a node
        Reason(
            "GpusBusy",
            "wait",
            "Too few GPUs are free on the node.",
            "노드에 비어 있는 GPU가 부족합니다.",
        ),
        Reason(
            "ReservedForOther",
            "wait",
            "The node's GPUs are kept for another pod, or this pod's are kept on another node.",
            "이 노드의 GPU는 다른 파드를 위해, 또는 이 파드의 GPU는 다른 노드에 예약되어 있습니다.",
        ),
        Reason(
            "GpuModelMismatch",
            "change",
            "The node has no GPU of an allowed model.",
            "노드에 허용된 모델의 GPU가 없습니다.",
        ),
        Reason(
            "MigProfileUnplaceable",
            "wait",
            "The node has no room for this MIG profile now.",
            "노드에 현재 이 MIG 프로파일을 배치할 자리가 없습니다.",
        ),
        Reason(
            "GpuMemoryShort",
            "wait",
            "Too little memory is free on the GPUs that may be shared.",
            "공유 가능한 GPU의 남은 메모리가 부족합니다.",
        ),
        Reason(
            "GpuCoreShort",
            "wait",
            "Too little compute time is free on the GPUs that may be shared.",
            "공유 가능한 GPU의 남은 연산 자원이 부족합니다.",
        ),
        Reason(
            "MigModeOff",
            "admin",
            "MIG mode is off on the GPUs that have this profile: an administrator must turn it on.",
            "이 프로파일을 지원하는 GPU의 MIG 모드가 꺼져 있습니다. 관리자가 켜야 합니다.",
        ),
        Reason(
            "SharingNotAllowed",
            "change",
            "GPUs are not shared on the node, or are shared where a whole one is asked.",
            "노드에서 GPU 공유가 허용되지 않거나, 전체 GPU 요청에 공유 GPU만 있습니다.",
        ),
        Reason(
            "GpuUnhealthy",
            "admin",
            "Too few healthy GPUs on the node.",
            "노드에 정상 GPU가 부족합니다.",
        ),
    )
}

OF_REQUEST: dict[str, str] = {
    "GpusBusy": "WaitingForCapacity",
    "ReservedForOther": "WaitingForCapacity",
    "GpuModelMismatch": "NoSuchGpuModel",
    "MigProfileUnplaceable": "WaitingForCapacity",
    "GpuMemoryShort": "WaitingForCapacity",
    "GpuCoreShort": "WaitingForCapacity",
    "SharingNotAllowed": "NoMatchingNode",
    "GpuUnhealthy": "AllGpusUnhealthy",
}
"""What the word of a node means for the whole request, when no node gets further; the others stay what they are."""
